"""A language model through the functions of stack.yml, behind the local gateway, by OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from isthmus_tools.cli.options import stack_variables
from isthmus_tools.engine import Engine
from support.language_router import openai_client
from support.paths import ROOT
from support.patience import LONG_S
from support.published_decoders import PublishedDecoder
from support.published_decoders import tiny_decoder as tiny_decoder

ASKED: Any = {"model": "tiny", "max_tokens": 24}


@pytest.fixture(scope="module")
def client(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    environment = {"*": {"threads": "1", "cache_dir": str(tmp_path_factory.mktemp("cache"))}}
    variables = stack_variables(str(tiny_decoder.registry)) | {"MODEL": "tiny"}
    with Engine(ROOT / "stack.yml", environment=environment, variables=variables) as engine:
        engine.wait_ready(2 * LONG_S)
        with openai_client(f"{engine.url}/function/router") as client:
            yield client


def text_of(client: openai.OpenAI, seed: int, *, stream: bool) -> str:
    messages: Any = [{"role": "user", "content": "the cat sat"}]
    asked: Any = {"messages": messages, "seed": seed, **ASKED}
    if not stream:
        return client.chat.completions.create(**asked).choices[0].message.content or ""
    # CE's gateway passes events on as they come for such an Accept alone; the local one does for any.
    accept = {"Accept": "text/event-stream"}
    chunks = client.chat.completions.create(**asked, stream=True, extra_headers=accept)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_eight_clients_at_once_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    alone = [text_of(client, seed, stream=False) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: text_of(client, seed, stream=seed % 2 == 0), range(8)))
    assert together == alone
    assert len(set(alone)) == 8


def test_the_layers_run_in_two_functions(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="the dog", temperature=0, **ASKED)
    facts = (whole.model_extra or {})["isthmus"]
    assert facts["link_bytes"] > 0
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24


def test_an_error_passes_the_gateway_in_openais_form(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as e:
        client.completions.create(model="nobody", prompt="a")
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(model="tiny", prompt="")
