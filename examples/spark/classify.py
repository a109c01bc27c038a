"""Score photos from Spark: each partition sends its photos to a router, in batches, through mapInPandas.

Run: python classify.py FOLDER RESULTS ROUTER_URL
"""

import sys
from collections.abc import Iterator

import pandas as pd
from pyspark.sql import SparkSession

from isthmus import Client

SCHEMA = "path string, label string, probability double, error string"
PHOTOS_A_REQUEST = 16


def classify(url: str, frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Frames with the likeliest class of each photo; a photo that cannot be read has its error instead."""
    client = Client(url, timeout_s=60)
    for frame in frames:
        for start in range(0, len(frame), PHOTOS_A_REQUEST):
            part = frame.iloc[start : start + PHOTOS_A_REQUEST]
            predictions = client.photos([bytes(content) for content in part["content"]], top_k=1)
            best = [(prediction.get("classes") or [{}])[0] for prediction in predictions]
            yield pd.DataFrame(
                {
                    "path": part["path"].to_numpy(),
                    "label": [each.get("label") for each in best],
                    "probability": [each.get("probability") for each in best],
                    "error": [prediction.get("error") for prediction in predictions],
                }
            )


def main(folder: str, results: str, url: str) -> None:
    """Score the photos of `folder` and write Parquet files to `results`."""
    spark = SparkSession.builder.appName("isthmus").getOrCreate()
    # A record batch holds whole photos, so it has few rows; the default is 10,000.
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", str(PHOTOS_A_REQUEST))
    photos = spark.read.format("binaryFile").load(folder).select("path", "content")
    photos.mapInPandas(lambda frames: classify(url, frames), SCHEMA).write.mode("overwrite").parquet(results)
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
