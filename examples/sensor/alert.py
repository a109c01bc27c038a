"""Turn results into alerts: of what the topic motion/results tells of watches, running goes to motion/alerts.

Run: python alert.py [MQTT_URL], beside `isthmus trigger trigger.toml`.
"""

import json
import math
import sys
import threading
import tomllib
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import urlsplit

from paho.mqtt.client import Client, MQTTMessage, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion

RESULTS, ALERTS, ALARMING = "motion/results", "motion/alerts", "running"
CLASSES = tomllib.loads(Path(__file__).with_name("train.toml").read_text())["data"]["classes"]


def subscribed(url: str, *topics: str) -> tuple[Client, SimpleQueue[MQTTMessage]]:
    """A client that is subscribed to topics, and the messages as they come."""
    address, messages, ready = urlsplit(url), SimpleQueue[MQTTMessage](), threading.Event()
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv311)
    # After a lost connection too.
    client.on_connect = lambda *_: client.subscribe([(topic, 1) for topic in topics])
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = lambda _, __, message: messages.put(message)
    client.connect(address.hostname or "", address.port or 1883)
    client.loop_start()
    ready.wait()
    return client, messages


def alert(client: Client, result: MQTTMessage) -> bool:
    """Publish an alert where a result is alarming; whether it is."""
    response = json.loads(result.payload)
    (output,) = response["outputs"]
    score, motion = max(zip(output["data"], CLASSES, strict=True))
    if motion != ALARMING:
        return False
    # Softmax, of the likeliest class.
    probability = 1 / sum(math.exp(each - score) for each in output["data"])
    # A request's id comes back with its result.
    message = {"watch": response["id"], "motion": motion, "probability": round(probability, 3)}
    client.publish(ALERTS, json.dumps(message), 1)
    return True


def main(url: str = "mqtt://127.0.0.1:1883") -> None:
    """Publish alerts until Ctrl-C."""
    client, results = subscribed(url, RESULTS)
    while True:
        alert(client, results.get())


if __name__ == "__main__":
    main(*sys.argv[1:])
