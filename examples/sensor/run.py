"""The whole example on this machine: watches send readings by MQTT, and alerts come out.

Run: python run.py

MQTT_URL names a broker; without it mosquitto is started for the run.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import train
from alert import ALARMING, ALERTS, RESULTS, alert, subscribed

from isthmus import RegistrySettings, open_registry
from isthmus.errors import Missing
from isthmus.events.configuration import read_configuration
from isthmus_tools import TriggerRequest, check_trigger, run_trigger
from isthmus_tools.engine import Engine

HERE = Path(__file__).parent
SETTINGS = RegistrySettings(registry=train.REGISTRY, cache_dir=".isthmus/commands")


@contextmanager
def broker() -> Iterator[str]:
    """The URL of a broker."""
    if url := os.environ.get("MQTT_URL"):
        yield url
        return
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        sys.exit("no MQTT broker: apt install mosquitto, or name one that runs: MQTT_URL=mqtt://HOST:1883")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([program, "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def router() -> Iterator[str]:
    """The URL of a router, once it and the functions behind it are ready; the model is trained where it is absent."""
    try:
        open_registry(SETTINGS).resolve("motion")
    except Missing:
        train.main()
    variables = {"MODEL": "motion", "ISTHMUS_REGISTRY": str(Path(train.REGISTRY).absolute())}
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


def reading(recording: np.ndarray) -> str:
    """A recording as a request of the Open Inference Protocol, as the watch measured it."""
    shape, data = [1, *recording.shape], recording.ravel().tolist()
    return json.dumps({"inputs": [{"name": "readings", "datatype": "FP32", "shape": shape, "data": data}]})


def main() -> None:
    """Send the recordings that the training did not see, and print alerts."""
    recordings, labels = train.recordings("TEST")
    with broker() as mqtt_url, router() as router_url, trigger({"MQTT_URL": mqtt_url, "ROUTER_URL": router_url}):
        client, messages = subscribed(mqtt_url, RESULTS, ALERTS)
        for watch, recording in enumerate(recordings):
            client.publish(f"watch/{watch}/readings", reading(recording), 1)
        results = alerts = sent = 0
        while results < len(recordings) or alerts < sent:
            message = messages.get()
            if message.topic == RESULTS:
                results += 1
                sent += alert(client, message)
            else:
                alerts += 1
                print(message.payload.decode())
        client.disconnect()
        client.loop_stop()
    running = sum(train.LABELS[label] == ALARMING for label in labels)
    print(f"{alerts} alerts of {len(recordings)} recordings, of which {running} are of somebody {ALARMING}")


if __name__ == "__main__":
    main()
