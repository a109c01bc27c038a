"""A real HDFS for tests: name node and data node of Hadoop 2.7, from the jars of a pyspark of that age.

`make store-servers` installs them; Java must be there. No package index has a newer name node.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hdfs_native import Client, WriteOptions

from support.leftovers import LIBRARY_PORTS
from support.paths import ROOT
from support.patience import until
from support.ports import free_port
from support.s3_server import listens

_JARS = ROOT / ".servers" / "hadoop"
# Hadoop 2.7 is of Java 7's time.
_JAVA = (
    "-Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Djava.net.preferIPv4Stack=true"
    " --add-opens java.base/java.lang=ALL-UNNAMED --add-opens java.base/java.net=ALL-UNNAMED"
    " --add-opens java.base/java.nio=ALL-UNNAMED --add-opens java.base/sun.nio.ch=ALL-UNNAMED"
    " --add-exports java.security.jgss/sun.security.krb5=ALL-UNNAMED"
)
_PACKAGE = "org.apache.hadoop.hdfs.server"


class HdfsServer:
    """A name node and a data node over `folder`, until `stop`; their superuser is `hdfs`."""

    def __init__(self, folder: Path) -> None:
        java = shutil.which("java")
        if java is None or not any(_JARS.glob("hadoop-hdfs-*.jar")):
            raise FileNotFoundError("HDFS is not installed: make store-servers, which needs Java")
        self.port, self.datanode_port = free_port(), free_port()
        self._folder = folder
        self._command = [java, *_JAVA.split(), "-cp", f"{folder / 'conf'}:{_JARS}/*"]
        self._configure()
        subprocess.run(self._command_of("namenode.NameNode", "-format", "-force"), **self._quiet(), check=True)
        self._processes = [
            subprocess.Popen(self._command_of(program), **self._quiet())
            for program in ("namenode.NameNode", "datanode.DataNode")
        ]
        if not until(lambda: listens(self.port) and listens(self.datanode_port) and self._writes()):
            self.stop()
            raise RuntimeError(f"HDFS did not start: {folder}")

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _writes(self) -> bool:
        try:
            client = Client(f"hdfs://{self.authority}", {"dfs.client.failover.max.attempts": "1"})
            # Of another name each time: a failed writer keeps its file's lease.
            with client.create(f"/.probe-{uuid4().hex}", WriteOptions()) as f:
                f.write(b"1")
        except (OSError, RuntimeError):  # the data node has not registered
            return False
        return True

    def _command_of(self, program: str, *arguments: str) -> list[str]:
        return [*self._command, f"{_PACKAGE}.{program}", *arguments]

    def _quiet(self) -> dict[str, object]:
        env = {**os.environ, "HADOOP_USER_NAME": "hdfs"}
        return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env, "cwd": self._folder}

    def _configure(self) -> None:
        conf = self._folder / "conf"
        for app in ("hdfs", "datanode"):  # the jars of pyspark have no pages
            (conf / "webapps" / app / "WEB-INF").mkdir(parents=True)
            (conf / "webapps" / app / "WEB-INF" / "web.xml").write_text("<web-app/>")
        (conf / "log4j.properties").write_text("log4j.rootLogger=OFF\n")
        values = {
            "fs.defaultFS": f"hdfs://{self.authority}",
            "hadoop.tmp.dir": str(self._folder / "tmp"),
            "dfs.replication": "1",
            "dfs.namenode.http-address": "127.0.0.1:0",
            "dfs.datanode.address": f"127.0.0.1:{self.datanode_port}",
            "dfs.datanode.http.address": "127.0.0.1:0",
            "dfs.datanode.ipc.address": "127.0.0.1:0",
            "dfs.namenode.datanode.registration.ip-hostname-check": "false",
            "dfs.namenode.safemode.extension": "0",
            "dfs.webhdfs.enabled": "false",
        }
        text = "".join(
            f"<property><name>{name}</name><value>{each}</value></property>" for name, each in values.items()
        )
        for name in ("core-site.xml", "hdfs-site.xml"):
            (conf / name).write_text(f"<configuration>{text}</configuration>")


@pytest.fixture(scope="session")
def hdfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HdfsServer]:
    os.environ["HADOOP_USER_NAME"] = "hdfs"
    try:
        server = HdfsServer(tmp_path_factory.mktemp("hdfs"))
    except FileNotFoundError as e:
        pytest.skip(str(e))
    LIBRARY_PORTS.update((server.port, server.datanode_port))
    yield server
    server.stop()
