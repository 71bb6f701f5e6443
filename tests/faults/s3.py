"""A real S3 server on this machine (moto, a process of its own), and a proxy before it that lets single requests go wrong."""

import contextlib
import http.client
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import boto3

from sanitize.artifacts.scan_profile import PROFILE

# what AWS answers; `retried`: by botocore and s3fs themselves
ANSWERS = {
    "throttled": (503, "SlowDown", "Please reduce your request rate."),
    "internal": (500, "InternalError", "We encountered an internal error. Please try again."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied"),
}
# not answered: the connection is reset instead of an answer, in the middle of one, or after the request was carried out
BROKEN = ("reset", "cut", "lost")
RETRIED = ("throttled", "internal", "slow", *BROKEN)
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    """Nobody listens there."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server that ends with the block."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, "moto's server did not start"
            assert time.monotonic() < end
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


class Bucket:
    """One bucket, seen by boto3: a client other than the product's."""

    numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, port: int) -> None:
        self.name = f"bucket-{next(self.numbers)}"
        self.endpoint = f"http://127.0.0.1:{port}"
        self.client: Any = boto3.client("s3", endpoint_url=self.endpoint, **_boto(CREDENTIALS))
        self.client.create_bucket(Bucket=self.name)

    def url(self, path: str) -> str:
        return f"s3://{self.name}/{path}"

    def upload(self, folder: Path, to: str) -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{to}/{path.relative_to(folder)}", path.read_bytes())
        return self.url(to)

    def put(self, path: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=path, Body=data)

    def delete(self, path: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=path)

    def clear(self, folder: str) -> None:
        for name in self.names(folder):
            self.delete(f"{folder}/{name}")

    def names(self, folder: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"{folder}/")
        return [entry["Key"].removeprefix(f"{folder}/") for page in pages for entry in page.get("Contents", ())]

    def tree_bytes(self, folder: str) -> dict[str, bytes]:
        """Every object below `folder`, by relative path: `builders.tree_bytes` of a bucket."""
        keys = {name: f"{folder}/{name}" for name in self.names(folder) if name != PROFILE}
        return {name: self.client.get_object(Bucket=self.name, Key=key)["Body"].read() for name, key in keys.items()}

    def all_buckets(self) -> list[str]:
        return [bucket["Name"] for bucket in self.client.list_buckets()["Buckets"]]

    def user_who_may(self, *actions: str) -> dict[str, str]:
        """Environment of a new user with these rights."""
        statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
        iam: Any = boto3.client("iam", endpoint_url=self.endpoint, **_boto(CREDENTIALS))
        iam.create_user(UserName="reader")
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName="reader", PolicyName="rights", PolicyDocument=policy)
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    @contextlib.contextmanager
    def permissions_checked(self) -> Iterator[None]:
        """Otherwise moto lets everybody do everything."""
        for requests_let_through in ("0", "inf"):
            plain = {"Content-Type": "text/plain"}
            address = f"{self.endpoint}/moto-api/reset-auth"
            urllib.request.urlopen(urllib.request.Request(address, requests_let_through.encode(), plain)).close()
            if requests_let_through == "0":
                yield


def _boto(environment: dict[str, str]) -> dict[str, str]:
    names = {"AWS_DEFAULT_REGION": "region_name"}
    return {names.get(name, name.lower()): value for name, value in environment.items()}


# ---------------------------------------------------------------- proxy


@dataclass(frozen=True)
class Request:
    """number: of all that came; path: "/bucket/key?query"."""

    number: int
    method: str
    path: str
    headers: dict[str, str]


Rule = Callable[[Request], str]  # "" or one of ANSWERS, BROKEN, "slow"


def nothing(_: Request) -> str:
    return ""


def always(fault: str, path: str, method: str = "") -> Rule:
    return lambda request: fault if path in request.path and method in ("", request.method) else ""


def first(count: int, rule: Rule) -> Rule:
    """Of the requests that `rule` names, the first `count`."""
    left = itertools.count()
    return lambda request: fault if (fault := rule(request)) and next(left) < count else ""


def seeded(seed: int, share: float, faults: tuple[str, ...] = RETRIED) -> Rule:
    """That share of all requests, each drawn by its number."""

    def rule(request: Request) -> str:
        rng = random.Random(f"{seed} {request.number}")
        return rng.choice(faults) if rng.random() < share else ""

    return rule


@dataclass
class Proxy:
    """Passes requests on to the server at `target`, but for what `rule` says. requests: all that came, with their faults."""

    target: int
    rule: Rule = nothing
    slow: float = 0.5  # seconds until a slow answer
    requests: list[tuple[Request, str]] = field(default_factory=list)
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def faults(self) -> list[str]:
        return [fault for _, fault in self.requests if fault]

    def reset(self, rule: Rule = nothing) -> None:
        self.rule = rule
        self.requests.clear()

    def judge(self, method: str, path: str, headers: dict[str, str]) -> str:
        with self.lock:
            request = Request(len(self.requests), method, path, headers)
            fault = self.rule(request)
            self.requests.append((request, fault))
            return fault


@contextlib.contextmanager
def faulty_proxy(target: int) -> Iterator[Proxy]:
    proxy = Proxy(target)

    class Handler(_Handler):
        plan = proxy

    server = _Server(("127.0.0.1", 0), Handler)
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that hung up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    plan: Proxy

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.plan.judge(self.command, self.path, dict(self.headers))
        if fault == "reset":
            return self._hang_up()
        if fault == "slow":
            time.sleep(self.plan.slow)
        if fault in ANSWERS:
            status, headers, data = _error_answer(fault)
        else:
            status, headers, data = self._forward(body)
        if fault == "lost":
            return self._hang_up()
        return self._answer(status, headers, data, cut=fault == "cut")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.plan.target)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        """Reset the connection: what lies in the client's buffer is an error, not an end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


def _error_answer(fault: str) -> tuple[int, dict[str, str], bytes]:
    status, code, words = ANSWERS[fault]
    text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{words}</Message></Error>"
    return status, {"Content-Type": "application/xml"}, text.encode()
