"""Score the photos of a bucket: S3 notifies a queue of each, a trigger has the router read and classify it.

Run: python score.py [FOLDER]. Without FOLDER the photos are five that come with packages. S3 and SQS are moto's server,
and the functions are processes of this machine.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import boto3

from isthmus import RegistrySettings
from isthmus.events.configuration import read_configuration
from isthmus_tools import ImportRequest, TriggerRequest, import_model, run_trigger
from isthmus_tools.engine import Engine
from isthmus_tools.zoo.photos import sample_photos

try:
    from moto.server import ThreadedMotoServer
except ImportError:
    sys.exit('S3 and SQS of this example are moto\'s server: pip install "moto[s3,sqs,server]"')

HERE = Path(__file__).parent
MODEL, BUCKET = "efficientnet-lite0", "holiday"
REGISTRY = os.environ.get("ISTHMUS_REGISTRY", ".isthmus/registry")


@contextmanager
def aws() -> Iterator[None]:
    """S3 and SQS on a free port, named by the variables that boto3 and the functions read."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        yield
    finally:
        server.stop()


def notifying_bucket() -> tuple[Any, str]:
    """A new bucket, and the URL of a queue that it notifies of what is written to photos/."""
    bucket = boto3.resource("s3").create_bucket(Bucket=BUCKET)
    queue = boto3.resource("sqs").create_queue(QueueName=f"{BUCKET}-photos")
    # Without the filter results would notify the queue too.
    photos = {"Key": {"FilterRules": [{"Name": "prefix", "Value": "photos/"}]}}
    notify = {"QueueArn": queue.attributes["QueueArn"], "Events": ["s3:ObjectCreated:*"], "Filter": photos}
    bucket.Notification().put(NotificationConfiguration={"QueueConfigurations": [notify]})
    return bucket, queue.url


@contextmanager
def router() -> Iterator[str]:
    """The URL of a router that may read the bucket, once it and the functions behind it are ready."""
    import_model(ImportRequest(model=MODEL, registry=settings(), if_absent=True), print)
    variables = {"MODEL": MODEL, "ISTHMUS_REGISTRY": str(Path(REGISTRY).absolute())}
    reads = {"router": {"event_buckets": BUCKET}}
    with Engine(HERE.parents[1] / "stack.yml", variables=variables, environment=reads) as engine:
        engine.wait_ready()
        yield f"{engine.url}/function/router"


def settings() -> RegistrySettings:
    """The registry, and S3 as the environment names it."""
    return RegistrySettings.from_env({**os.environ, "registry": REGISTRY, "cache_dir": ".isthmus/commands"})


def documents(bucket: Any, prefix: str) -> Iterator[Any]:
    """The JSON of each object, without the headers beside dead letters."""
    for item in bucket.objects.filter(Prefix=prefix):
        if not item.key.endswith(".headers.json"):
            yield json.load(item.get()["Body"])


def lines(bucket: Any) -> Iterator[str]:
    """A line for each photo: its likeliest class, or that its notification is a dead letter."""
    for result in documents(bucket, "results/"):
        for prediction in result["predictions"]:
            best = prediction["classes"][0]
            yield f"{prediction['object']}: {best['label']} {best['probability']:.2f}"
    for notification in documents(bucket, "failed/"):
        for record in notification["Records"]:
            yield f"s3://{BUCKET}/{unquote_plus(record['s3']['object']['key'])}: failed"


def main(folder: str = "") -> None:
    """Write the photos to the bucket, score them in batch, and print the results."""
    photos = [path for path in Path(folder).iterdir() if path.is_file()] if folder else sample_photos()
    with aws():
        bucket, queue_url = notifying_bucket()
        for photo in photos:
            bucket.put_object(Key=f"photos/{photo.name}", Body=photo.read_bytes())
        print(f"{len(photos)} photos are in s3://{BUCKET}/photos/, and their notifications in {queue_url}")
        with router() as url:
            variables = {"BUCKET": BUCKET, "QUEUE_URL": queue_url, "ROUTER_URL": url}
            configuration = read_configuration(HERE / "trigger.toml", variables)
            request = TriggerRequest(configuration=configuration, settings=settings(), until_empty=True)
            counts = run_trigger(request).counts
        print(f"{counts['received']} notifications, {counts['done']} scored, {counts['failed']} failed")
        print(*sorted(lines(bucket)), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
