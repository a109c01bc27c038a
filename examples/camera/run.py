"""The whole example on this machine: pictures of a watched folder are classified, and their classes come by MQTT.

Run: python run.py [FOLDER]

With FOLDER it is watched until Ctrl-C; without it five pictures are put into a folder, one a second. MQTT_URL names a
broker; without it mosquitto is started for the run.
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
from queue import SimpleQueue
from urllib.parse import unquote, urlsplit

from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from watch import watch

from isthmus import RegistrySettings
from isthmus.events.configuration import TriggerConfiguration, read_configuration
from isthmus_tools import ImportRequest, TriggerRequest, check_trigger, import_model, run_trigger
from isthmus_tools.engine import Engine
from isthmus_tools.zoo.photos import sample_photos

ROOT = Path(__file__).parents[2]
MODEL = "efficientnet-lite0"
REGISTRY = os.environ.get("ISTHMUS_REGISTRY", ".isthmus/registry")
# The token of the engine's NATS server is a secret of the engine.
SETTINGS = RegistrySettings(
    registry=REGISTRY, cache_dir=".isthmus/commands", secrets_dir=str(ROOT / ".isthmus" / "secrets")
)


@contextmanager
def broker() -> Iterator[str]:
    """The URL of an MQTT broker."""
    if url := os.environ.get("MQTT_URL"):
        yield url
        return
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        sys.exit("no MQTT broker: apt install mosquitto, or name one that runs: MQTT_URL=mqtt://HOST:1883")
    port = free_port()
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


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def functions() -> Iterator[tuple[str, str]]:
    """The URLs of the functions' router and of the NATS server beside them, once they are ready."""
    import_model(ImportRequest(model=MODEL, registry=SETTINGS, if_absent=True), print)
    variables = {"MODEL": MODEL, "ISTHMUS_REGISTRY": str(Path(REGISTRY).absolute())}
    port = free_port()
    with Engine(ROOT / "stack.yml", variables=variables, nats_port=port) as engine:
        engine.wait_ready()
        yield f"{engine.url}/function/router", f"nats://127.0.0.1:{port}"


@contextmanager
def trigger(configuration: TriggerConfiguration) -> Iterator[None]:
    """A running trigger, once all that it names answers."""
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


@contextmanager
def subscribed(url: str, *topics: str) -> Iterator[SimpleQueue[MQTTMessage]]:
    """The messages of topics, from now on."""
    address, messages, ready = urlsplit(url), SimpleQueue[MQTTMessage](), threading.Event()
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
    client.on_connect = lambda *_: client.subscribe([(topic, 1) for topic in topics])
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = lambda _, __, message: messages.put(message)
    client.connect(address.hostname or "", address.port or 1883)
    client.loop_start()
    ready.wait()
    try:
        yield messages
    finally:
        client.disconnect()
        client.loop_stop()


def take_pictures(folder: Path) -> None:
    """Be the camera: five photos that come with packages, one a second."""
    for photo in sample_photos():
        shutil.copy(photo, folder)
        time.sleep(1)


def described(message: MQTTMessage) -> str:
    """A line for a result or a dead letter, with the name of the picture's file."""
    headers = dict(message.properties.UserProperty)
    name = unquote(headers["x-isthmus-file"])
    if "x-isthmus-reason" in headers:
        return f"{name}: {headers['x-isthmus-reason']}"
    best = json.loads(message.payload)["classes"][0]
    return f"{name}: {best['label']} {best['probability']:.2f}"


def main(folder: str = "") -> None:
    """Watch the folder, and print what comes by MQTT."""
    pictures, variables = Path(folder), dict[str, str]()
    if not folder:
        # Anew each time: a picture whose result is in the records has no second one.
        demo = Path(".isthmus", "camera-demo")
        shutil.rmtree(demo, ignore_errors=True)
        pictures, variables = demo / "pictures", {"RECORDS": str(demo / "records.sqlite")}
        pictures.mkdir(parents=True)
    with broker() as mqtt_url, functions() as (router_url, nats_url):
        variables |= {"MQTT_URL": mqtt_url, "ROUTER_URL": router_url, "NATS_URL": nats_url}
        configuration = read_configuration(Path(__file__).with_name("trigger.toml"), variables)
        with trigger(configuration), subscribed(mqtt_url, "camera/classes", "camera/failed") as messages:
            threading.Thread(target=watch, args=(configuration, SETTINGS, pictures), daemon=True).start()
            if not folder:
                threading.Thread(target=take_pictures, args=(pictures,), daemon=True).start()
            left = -1 if folder else len(sample_photos())
            while left:
                print(described(messages.get()), flush=True)
                left -= 1


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
