"""A real S3 server on this machine, with one bucket, for tests of object storage."""

import os
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

_KEYS = ("testaccesskey", "testsecretkey")
_START_SECONDS = 30.0


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Serve the subfolders of `folder` as buckets; yield the environment variables that reach them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rclone = Path(sysconfig.get_path("scripts")) / "rclone"
    command = [str(rclone), "serve", "s3", "--auth-key", ",".join(_KEYS), "--addr", f"127.0.0.1:{port}", str(folder)]
    environment = os.environ | {"RCLONE_CONFIG": str(folder.parent / "no-rclone.conf")}
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    try:
        _wait_until_ready(server, port)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": _KEYS[0],
            "AWS_SECRET_ACCESS_KEY": _KEYS[1],
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.kill()
        server.communicate()


def _wait_until_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = monotonic() + _START_SECONDS
    while monotonic() < deadline:
        assert server.poll() is None, server.communicate()[0].decode()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            with suppress(subprocess.TimeoutExpired):
                server.wait(0.05)
        else:
            return
    raise TimeoutError(f"no S3 server on port {port} after {_START_SECONDS} s")
