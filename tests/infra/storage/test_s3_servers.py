"""The S3 servers and the fault proxy of other tests, and what these servers check."""

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from botocore.exceptions import ClientError, FlexibleChecksumError

from tests.support.s3_proxy import (
    ACCESS_DENIED,
    INTERNAL_ERROR,
    NO_SUCH_BUCKET,
    SLOW_DOWN,
    Action,
    AlterRequestBody,
    AlterResponseBody,
    Answer,
    Delay,
    DropAnswer,
    DropRequestHeaders,
    DropResponseHeaders,
    Fault,
    FaultProxy,
    ResetConnection,
    ShortenBody,
    Trickle,
    TruncateBody,
    WrongEtag,
    clock_skewed,
    permanent_redirect,
    wrong_region,
)
from tests.support.s3_servers import S3Server, rclone_binary, rclone_server

ROOT = Path(__file__).resolve().parents[3]
MB = 1024 * 1024


@pytest.fixture(params=["rclone", "moto"])
def s3(request: pytest.FixtureRequest) -> S3Server:
    server: S3Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return _new_bucket(s3)


def _new_bucket(server: S3Server) -> str:
    name = f"b-{uuid.uuid4().hex}"
    server.make_bucket(name)
    return name


def _keys(client: Any, bucket: str) -> list[str]:
    return [each["Key"] for each in client.list_objects_v2(Bucket=bucket).get("Contents", [])]


def _refusal(call: Callable[..., Any], **arguments: Any) -> tuple[int, str]:
    """Return the status and the code that a call of boto3's is refused with."""
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return caught.value.response["ResponseMetadata"]["HTTPStatusCode"], caught.value.response["Error"]["Code"]


def _base64_of(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


WRONG_SHA256 = _base64_of(hashlib.sha256(b"other bytes").digest())
WRONG_MD5 = _base64_of(hashlib.md5(b"other bytes").digest())


class TestServers:
    @pytest.mark.parametrize("way", ["direct", "proxied"])
    def test_everyday_operations(self, s3: S3Server, bucket: str, way: str) -> None:
        with FaultProxy(s3) as proxy:
            client = (s3 if way == "direct" else s3.at(proxy.endpoint_url)).client()
            at = {"Bucket": bucket, "Key": "a folder/ä+b=c&d~.bin"}
            etag = client.put_object(**at, Body=b"0123456789")["ETag"]
            assert client.head_object(**at)["ContentLength"] == 10
            assert client.head_object(**at)["ETag"] == etag == f'"{hashlib.md5(b"0123456789").hexdigest()}"'
            assert client.get_object(**at)["Body"].read() == b"0123456789"
            assert _keys(client, bucket) == [at["Key"]]
            client.delete_object(**at)
            assert _keys(client, bucket) == []
            assert _refusal(client.get_object, **at) == (404, "NoSuchKey")
            client.delete_object(**at)  # deleting what is not there is no error

            content = os.urandom(10 * MB)
            at = {"Bucket": bucket, "Key": "large"}
            upload = client.create_multipart_upload(**at)["UploadId"]
            halves = {1: content[: 5 * MB], 2: content[5 * MB :]}
            etags = {
                number: client.upload_part(**at, UploadId=upload, PartNumber=number, Body=half)["ETag"]
                for number, half in halves.items()
            }
            parts = [{"PartNumber": number, "ETag": tag} for number, tag in etags.items()]
            client.complete_multipart_upload(**at, UploadId=upload, MultipartUpload={"Parts": parts})
            assert client.get_object(**at)["Body"].read() == content
            if way == "proxied":
                assert proxy.bytes_up > 10 * MB
                assert proxy.bytes_down > 10 * MB
                assert [each.request_body_bytes for each in proxy.requests_of("PUT", "partNumber")] == [5 * MB, 5 * MB]

    def test_pages_of_a_listing(self, s3: S3Server, bucket: str) -> None:
        client = s3.client()
        for number in range(7):
            client.put_object(Bucket=bucket, Key=f"some/{number}", Body=b"")
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix="some/", PaginationConfig={"PageSize": 3}
        )
        assert [len(page["Contents"]) for page in pages] == [3, 3, 1]

    def test_several_client_processes_at_once(self, s3: S3Server, bucket: str) -> None:
        program = (
            "import sys; from tests.support.s3_servers import S3Server\n"
            "client = S3Server(*sys.argv[1:5]).client()\n"
            "for number in range(10):\n"
            "    at = {'Bucket': sys.argv[5], 'Key': f'{sys.argv[6]}/{number}'}\n"
            "    client.put_object(**at, Body=sys.argv[6].encode() * 100_000)\n"
            "    assert client.get_object(**at)['Body'].read() == sys.argv[6].encode() * 100_000\n"
        )
        command = [sys.executable, "-c", program, *dataclasses.astuple(s3), bucket]
        clients = [subprocess.Popen([*command, name], cwd=ROOT) for name in "abc"]
        assert [client.wait(120) for client in clients] == [0, 0, 0]
        assert len(_keys(s3.client(), bucket)) == 30

    def test_wrong_credentials(self, rclone: S3Server, moto: S3Server) -> None:
        for server, expected in ((rclone, 403), (moto, 200)):
            client = dataclasses.replace(server, secret_access_key="wrong").client()
            try:
                status = client.list_buckets()["ResponseMetadata"]["HTTPStatusCode"]
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            assert status == expected

    def test_a_port_in_use_shows_the_log(self, rclone: S3Server, tmp_path: Path) -> None:
        port = urlsplit(rclone.endpoint_url).port
        with pytest.raises(RuntimeError, match="address already in use"), rclone_server(tmp_path / "b", port=port):
            pass

    def test_it_ends_on_exceptions_and_comes_back_at_its_address(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), rclone_server(tmp_path / "buckets") as server:
            server.make_bucket("bucket")
            server.client().put_object(Bucket="bucket", Key="key", Body=b"kept")
            raise ZeroDivisionError
        address = urlsplit(server.endpoint_url)
        with socket.socket() as probe:
            assert probe.connect_ex((address.hostname, address.port)) != 0
        with rclone_server(tmp_path / "buckets", port=address.port) as again:
            assert again == server
            assert again.client().get_object(Bucket="bucket", Key="key")["Body"].read() == b"kept"

    def test_the_binary_is_found_without_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert b"rclone v1." in subprocess.run([rclone_binary(), "version"], capture_output=True, check=True).stdout


class TestFacts:
    """Facts about these servers that differ from S3, or apply to one of them only, on which tests can rely."""

    def test_moto_alone_knows_conditional_writes(self, s3: S3Server, bucket: str) -> None:
        client = s3.client()
        at = {"Bucket": bucket, "Key": "key"}
        client.put_object(**at, Body=b"first", IfNoneMatch="*")
        if s3.kind == "moto":
            assert _refusal(client.put_object, **at, Body=b"second", IfNoneMatch="*") == (412, "PreconditionFailed")
            assert _refusal(client.put_object, **at, Body=b"second", IfMatch='"0"') == (412, "PreconditionFailed")
        else:
            client.put_object(**at, Body=b"second", IfNoneMatch="*")
            client.put_object(**at, Body=b"third", IfMatch='"0"')
            assert client.get_object(**at)["Body"].read() == b"third"

    def test_neither_checks_a_sha256(self, s3: S3Server, bucket: str) -> None:
        client = s3.client()
        at = {"Bucket": bucket, "Key": "key"}
        client.put_object(**at, Body=b"these bytes", ChecksumSHA256=WRONG_SHA256)
        head = client.head_object(**at, ChecksumMode="ENABLED")
        assert head.get("ChecksumSHA256") == (WRONG_SHA256 if s3.kind == "rclone" else None)
        upload = client.create_multipart_upload(**at)["UploadId"]
        client.upload_part(**at, UploadId=upload, PartNumber=1, Body=b"these bytes", ChecksumSHA256=WRONG_SHA256)

    def test_neither_compares_the_body_with_the_signed_digest(self, s3: S3Server, bucket: str) -> None:
        with FaultProxy(s3) as proxy:
            proxy.add(Fault("PUT", "key", AlterRequestBody(offset=0)))
            s3.at(proxy.endpoint_url).client().put_object(Bucket=bucket, Key="key", Body=b"abc")
        client = s3.client(response_checksum_validation="when_required")
        assert client.get_object(Bucket=bucket, Key="key")["Body"].read() == b"`bc"

    def test_rclone_sends_the_whole_objects_checksum_with_a_range(self, s3: S3Server, bucket: str) -> None:
        at = {"Bucket": bucket, "Key": "key"}
        strict, lax = s3.client(), s3.client(response_checksum_validation="when_required")
        strict.put_object(**at, Body=b"0123456789")
        body = strict.get_object(**at, Range="bytes=3-5")["Body"]
        if s3.kind == "rclone":
            with pytest.raises(FlexibleChecksumError):
                body.read()
        else:
            assert body.read() == b"345"
        assert lax.get_object(**at, Range="bytes=3-5")["Body"].read() == b"345"
        assert _refusal(lax.get_object, **at, Range="bytes=10-") == (416, "InvalidRange")

    def test_rclone_alone_checks_an_md5(self, s3: S3Server, bucket: str) -> None:
        client = s3.client()
        at = {"Bucket": bucket, "Key": "key"}
        upload = client.create_multipart_upload(**at)["UploadId"]
        part = {**at, "UploadId": upload, "PartNumber": 1}
        if s3.kind == "rclone":
            assert _refusal(client.put_object, **at, Body=b"these bytes", ContentMD5=WRONG_MD5) == (400, "BadDigest")
            assert _keys(client, bucket) == []
            assert _refusal(client.upload_part, **part, Body=b"these bytes", ContentMD5=WRONG_MD5) == (400, "BadDigest")
        else:
            client.put_object(**at, Body=b"these bytes", ContentMD5=WRONG_MD5)
            client.upload_part(**part, Body=b"these bytes", ContentMD5=WRONG_MD5)

    def test_unfinished_uploads_can_be_listed_and_aborted_and_are_no_objects(self, s3: S3Server, bucket: str) -> None:
        client = s3.client()
        at = {"Bucket": bucket, "Key": "key"}
        upload = client.create_multipart_upload(**at)["UploadId"]
        client.upload_part(**at, UploadId=upload, PartNumber=1, Body=b"x" * 5 * MB)
        assert [each["UploadId"] for each in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == [upload]
        assert [each["Size"] for each in client.list_parts(**at, UploadId=upload)["Parts"]] == [5 * MB]
        assert _keys(client, bucket) == []
        assert _refusal(client.head_object, **at)[0] == 404
        client.abort_multipart_upload(**at, UploadId=upload)
        assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)
        assert _refusal(client.abort_multipart_upload, **at, UploadId=upload) == (404, "NoSuchUpload")
        expected = (404, "NoSuchUpload") if s3.kind == "rclone" else (500, "500")
        assert _refusal(client.upload_part, **at, UploadId=upload, PartNumber=2, Body=b"x") == expected

    def test_a_part_can_be_replaced_by_other_bytes_at_moto_only(self, s3: S3Server, bucket: str) -> None:
        client = s3.client()
        at = {"Bucket": bucket, "Key": "key"}
        part = {**at, "UploadId": client.create_multipart_upload(**at)["UploadId"], "PartNumber": 1}
        client.upload_part(**part, Body=b"x" * 100)
        client.upload_part(**part, Body=b"x" * 100)
        if s3.kind == "moto":
            client.upload_part(**part, Body=b"y" * 100)
        else:
            assert _refusal(client.upload_part, **part, Body=b"y" * 100) == (501, "NotImplemented")

    def test_rclone_loses_unfinished_uploads_and_metadata_in_a_restart(self, tmp_path: Path) -> None:
        at = {"Bucket": "bucket", "Key": "key"}
        with rclone_server(tmp_path / "buckets") as server:
            server.make_bucket("bucket")
            client = server.client()
            client.put_object(Bucket="bucket", Key="other", Body=b"x", Metadata={"name": "value"})
            upload = client.create_multipart_upload(**at)["UploadId"]
            client.upload_part(**at, UploadId=upload, PartNumber=1, Body=b"x" * 5 * MB)
        with rclone_server(tmp_path / "buckets") as server:
            client = server.client()
            assert _refusal(client.list_parts, **at, UploadId=upload) == (404, "NoSuchUpload")
            assert _keys(client, "bucket") == ["other"]
            assert client.head_object(Bucket="bucket", Key="other")["Metadata"] == {}
        assert len(list(tmp_path.rglob(".rclone_temp_multipart_*"))) == 1  # stays for ever, listed nowhere

    def test_rclone_does_not_see_files_that_come_and_go_on_its_disk(self, tmp_path: Path) -> None:
        with rclone_server(tmp_path / "buckets") as server:
            server.make_bucket("bucket")
            client = server.client()
            for key in ("altered", "removed"):
                client.put_object(Bucket="bucket", Key=key, Body=b"abc")
            (tmp_path / "buckets/bucket/altered").write_bytes(b"xyz")
            (tmp_path / "buckets/bucket/removed").unlink()
            (tmp_path / "buckets/bucket/added").write_bytes(b"abc")
            assert client.get_object(Bucket="bucket", Key="altered")["Body"].read() == b"xyz"
            assert _keys(client, "bucket") == ["altered", "removed"]
        with rclone_server(tmp_path / "buckets") as server:
            assert _keys(server.client(), "bucket") == ["added", "altered"]

    def test_times_of_a_listing_are_in_milliseconds_at_rclone_and_in_seconds_at_moto(
        self, s3: S3Server, bucket: str
    ) -> None:
        client = s3.client()
        for number in range(5):
            client.put_object(Bucket=bucket, Key=f"{number}", Body=b"")
        times = [each["LastModified"] for each in client.list_objects_v2(Bucket=bucket)["Contents"]]
        assert all(each.microsecond % 1000 == 0 for each in times)
        assert any(each.microsecond for each in times) == (s3.kind == "rclone")
        assert client.head_object(Bucket=bucket, Key="0")["LastModified"].microsecond == 0

    def test_a_client_killed_in_a_put_leaves_nothing(self, s3: S3Server, bucket: str) -> None:
        program = (
            "import os, sys; from tests.support.s3_servers import S3Server\n"
            "class Body:\n"
            "    def __init__(self): self.left = 50\n"
            "    def read(self, size=-1):\n"
            "        self.left -= 1\n"
            "        if self.left == 25: print('half', flush=True); sys.stdin.read()\n"
            "        return b'x' * 100_000 if self.left >= 0 else b''\n"
            "url = S3Server(*sys.argv[1:5]).client().generate_presigned_url(\n"
            "    'put_object', Params={'Bucket': sys.argv[5], 'Key': 'folder/key'})\n"
            "import http.client, urllib.parse\n"
            "split = urllib.parse.urlsplit(url)\n"
            "connection = http.client.HTTPConnection(split.netloc)\n"
            "connection.request('PUT', f'{split.path}?{split.query}', Body(), {'Content-Length': '5000000'})\n"
        )
        command = [sys.executable, "-c", program, *dataclasses.astuple(s3), bucket]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin and process.stdout
        client = s3.client()
        try:
            assert process.stdout.readline().strip() == b"half"
            assert _keys(client, bucket) == []  # while it is on its way
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        time.sleep(0.3)  # the server hears of it
        assert _keys(client, bucket) == []
        assert _refusal(client.head_object, Bucket=bucket, Key="folder/key")[0] == 404

    def test_rclone_lets_all_of_many_conditional_writers_through_but_for_errors_of_its_own(
        self, rclone: S3Server
    ) -> None:
        statuses = _race(rclone, _new_bucket(rclone), rounds=20, writers=8)
        assert {status for of_round in statuses for status in of_round} <= {200, 500}
        assert max(of_round.count(200) for of_round in statuses) > 1


def _race(server: S3Server, bucket: str, *, rounds: int, writers: int) -> list[list[int]]:
    """Write each of `rounds` keys by `writers` conditional puts at once; return each round's statuses."""
    clients = [server.client(retries={"total_max_attempts": 1}) for _ in range(writers)]
    barrier = Barrier(writers)

    def write(writer: int, number: int) -> int:
        barrier.wait(60)
        try:
            answer = clients[writer].put_object(Bucket=bucket, Key=f"{number}", Body=b"%d" % writer, IfNoneMatch="*")
        except ClientError as error:
            answer = error.response
        return int(answer["ResponseMetadata"]["HTTPStatusCode"])

    with ThreadPoolExecutor(writers) as pool:
        return [list(pool.map(write, range(writers), [number] * writers)) for number in range(rounds)]


class TestConditionalWrites:
    """With the proxy's checks, both servers behave like S3."""

    def test_they_hold_or_are_refused(self, s3: S3Server, bucket: str) -> None:
        with FaultProxy(s3, conditional_writes=True) as proxy:
            client = s3.at(proxy.endpoint_url).client()
            at = {"Bucket": bucket, "Key": "a/ä key"}
            assert _refusal(client.put_object, **at, Body=b"0", IfMatch='"0"') == (404, "NoSuchKey")
            etag = client.put_object(**at, Body=b"1", IfNoneMatch="*")["ETag"]
            assert _refusal(client.put_object, **at, Body=b"x" * MB, IfNoneMatch="*") == (412, "PreconditionFailed")
            assert proxy.requests[-1].request_body_bytes == 0  # refused before the body was asked for
            etag = client.put_object(**at, Body=b"2", IfMatch=etag)["ETag"]
            assert _refusal(client.put_object, **at, Body=b"3", IfMatch='"0"') == (412, "PreconditionFailed")
            upload = client.create_multipart_upload(**at)["UploadId"]
            tag = client.upload_part(**at, UploadId=upload, PartNumber=1, Body=b"4")["ETag"]
            complete = {**at, "UploadId": upload, "MultipartUpload": {"Parts": [{"PartNumber": 1, "ETag": tag}]}}
            assert _refusal(client.complete_multipart_upload, **complete, IfNoneMatch="*") == (
                412,
                "PreconditionFailed",
            )
            assert client.get_object(**at)["Body"].read() == b"2"
            assert client.head_object(**at)["ETag"] == etag

    def test_of_many_writers_at_once_exactly_one_gets_through(self, rclone: S3Server) -> None:
        bucket = _new_bucket(rclone)
        with FaultProxy(rclone, conditional_writes=True) as proxy:
            statuses = _race(rclone.at(proxy.endpoint_url), bucket, rounds=25, writers=8)
        assert [sorted(of_round) for of_round in statuses] == [[200, *[412] * 7]] * 25

    def test_the_first_complete_one_wins(self, rclone: S3Server) -> None:
        bucket = _new_bucket(rclone)
        with FaultProxy(rclone, conditional_writes=True) as proxy, ThreadPoolExecutor(1) as pool:
            client = rclone.at(proxy.endpoint_url).client()
            proxy.add(Fault("PUT", "key", Trickle(0, seconds=1.0, upload=True), times=1))
            slow = pool.submit(
                _refusal, client.put_object, Bucket=bucket, Key="key", Body=b"slow" * 1000, IfNoneMatch="*"
            )
            while not proxy.requests_of("PUT", "key"):
                time.sleep(0.01)
            client.put_object(Bucket=bucket, Key="key", Body=b"quick", IfNoneMatch="*")
            assert slow.result(60) == (412, "PreconditionFailed")
            assert client.get_object(Bucket=bucket, Key="key")["Body"].read() == b"quick"


CONTENT = bytes(range(256)) * 4000


class _Origin(BaseHTTPRequestHandler):
    """Keeps what is put, under any path; answers a GET of "/chunked..." in chunks."""

    protocol_version = "HTTP/1.1"
    kept: dict[str, bytes]
    headers_seen: list[dict[str, str]]

    def log_message(self, *_: object) -> None:
        pass

    def do_PUT(self) -> None:
        self.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length", 0))
            pieces = [piece for piece in self._pieces(length) if self.path != "/sink"]
            content = b"".join(pieces)
        self.kept[self.path] = content
        self._answer(b"")

    def _pieces(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self.rfile.read(min(length, MB))
            if not piece:
                raise ConnectionAbortedError
            length -= len(piece)
            yield piece

    def do_GET(self) -> None:
        self._answer(self.kept.get(self.path, CONTENT))

    do_HEAD = do_GET

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", '"right"')
        self.send_header("x-amz-checksum-crc32", "AAAAAA==")
        if self.path.startswith("/chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(content), 100_000):
                piece = content[start : start + 100_000]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class _Served:
    """An origin, a proxy before it and a raw client of the proxy."""

    def __init__(self, proxy: FaultProxy, origin: type[_Origin]) -> None:
        self.proxy = proxy
        self.kept = origin.kept
        self.headers_seen = origin.headers_seen
        self.connection = http.client.HTTPConnection(proxy.endpoint_url.removeprefix("http://"), timeout=20)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, body, names, encode_chunked=headers.get("Transfer_Encoding") == "chunked")
        return self.connection.getresponse()

    def get(self, path: str) -> bytes:
        return self.ask("GET", path).read()


class _OriginServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        pass  # connections are reset on purpose


@pytest.fixture
def served() -> Iterator[_Served]:
    origin = type("Origin", (_Origin,), {"kept": {}, "headers_seen": []})
    with _OriginServer(("127.0.0.1", 0), origin) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with FaultProxy(f"http://127.0.0.1:{server.server_port}") as proxy:
            yield _Served(proxy, origin)
        server.shutdown()


class TestFaultProxy:
    def test_without_faults_all_passes_over_one_connection(self, served: _Served) -> None:
        assert served.ask("PUT", "/a", CONTENT).read() == b""
        assert served.ask("PUT", "/b", iter([b"one", b"two"]), Transfer_Encoding="chunked").read() == b""
        assert served.kept == {"/a": CONTENT, "/b": b"onetwo"}
        socket_of_the_first = served.connection.sock
        head = served.ask("HEAD", "/a?x=1")
        assert (head.read(), head.headers["Content-Length"]) == (b"", str(len(CONTENT)))
        assert served.get("/chunked") == served.get("/x") == CONTENT
        assert served.connection.sock is socket_of_the_first
        host = served.proxy.endpoint_url.removeprefix("http://")
        assert [each["host"] for each in served.headers_seen] == [host, host]
        log = [(each.method, each.path, each.status, each.request_body_bytes) for each in served.proxy.requests]
        assert log[:3] == [("PUT", "/a", 200, len(CONTENT)), ("PUT", "/b", 200, 6), ("HEAD", "/a", 200, 0)]
        assert served.proxy.bytes_up == len(CONTENT) + 6
        assert served.proxy.bytes_down == 2 * len(CONTENT)
        served.proxy.forget()
        assert (served.proxy.requests, served.proxy.bytes_up) == ([], 0)

    def test_a_body_that_waits_for_the_continue_response(self, served: _Served) -> None:
        address = urlsplit(served.proxy.endpoint_url)
        head = b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        with socket.create_connection((address.hostname, address.port), 10) as raw:
            raw.sendall(head)
            assert raw.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            raw.sendall(b"abc")
            assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        assert served.kept["/a"] == b"abc"
        served.proxy.add(Fault("PUT", "/a", SLOW_DOWN))
        with socket.create_connection((address.hostname, address.port), 10) as raw:
            raw.sendall(head)
            assert raw.recv(1000).startswith(b"HTTP/1.1 503 SlowDown")
        assert served.proxy.requests[-1].request_body_bytes == 0

    def test_which_requests_are_hit(self, served: _Served) -> None:
        def statuses(count: int, path: str = "/blobs/1") -> list[int]:
            answers = []
            for _ in range(count):
                answer = served.ask("GET", path)
                answer.read()
                answers.append(answer.status)
            return answers

        first_two = Fault("GET|HEAD", r"/blobs/\d$", SLOW_DOWN, times=2)
        served.proxy.add(first_two)
        assert statuses(2, "/other") == [200, 200]
        assert statuses(4) == [503, 503, 200, 200]
        assert served.proxy.hits(first_two) == 2
        served.proxy.clear()
        served.proxy.add(Fault("*", r"\?id=7", SLOW_DOWN, every=3))
        assert statuses(6, "/x?id=7") == [200, 200, 503, 200, 200, 503]
        served.proxy.clear()
        served.proxy.add(Fault("GET", "", SLOW_DOWN, after=1, times=1), Fault("PUT", "", ResetConnection()))
        assert statuses(4) == [200, 503, 200, 200]
        assert [each.actions for each in served.proxy.requests_of("GET", "")[-4:]] == [(), (SLOW_DOWN,), (), ()]

    @pytest.mark.parametrize(
        ("answer", "status", "code"),
        [
            (SLOW_DOWN, 503, "SlowDown"),
            (INTERNAL_ERROR, 500, "InternalError"),
            (ACCESS_DENIED, 403, "AccessDenied"),
            (NO_SUCH_BUCKET, 404, "NoSuchBucket"),
            (clock_skewed(7200), 403, "RequestTimeTooSkewed"),
            (permanent_redirect("eu-west-1"), 301, "PermanentRedirect"),
            (wrong_region("eu-west-1"), 400, "AuthorizationHeaderMalformed"),
            (Answer(418, "Custom", "<own> & words", headers=(("Retry-After", "1"),)), 418, "Custom"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_errors_of_s3(self, served: _Served, answer: Answer, status: int, code: str) -> None:
        served.proxy.add(Fault("*", "", answer))
        got = served.ask("PUT", "/a", CONTENT)
        text = got.read().decode()
        assert (got.status, got.headers["Content-Type"]) == (status, "application/xml")
        assert f"<Code>{code}</Code>" in text
        assert served.kept == {}
        assert served.ask("HEAD", "/a").read() == b""
        if answer.region:
            assert (got.headers["x-amz-bucket-region"], "<Region>eu-west-1</Region>" in text) == ("eu-west-1", True)
        if answer.skew_s:
            assert 7000 < parsedate_to_datetime(got.headers["Date"]).timestamp() - time.time() < 7300
        if answer.headers:
            assert (got.headers["Retry-After"], "&lt;own&gt; &amp; words" in text) == ("1", True)

    def test_boto3_understands_the_errors(self, s3: S3Server, bucket: str) -> None:
        with FaultProxy(s3) as proxy:
            client = s3.at(proxy.endpoint_url).client(retries={"total_max_attempts": 1})
            proxy.add(Fault("PUT", "/key", SLOW_DOWN, times=1), Fault("PUT", "/key", ACCESS_DENIED, after=1))
            at = {"Bucket": bucket, "Key": "key"}
            assert _refusal(client.put_object, **at, Body=b"x" * MB) == (503, "SlowDown")
            assert _refusal(client.put_object, **at, Body=b"x" * MB) == (403, "AccessDenied")
            assert proxy.bytes_up == 0  # boto3 holds bodies back until it is asked for them

    def test_a_reset_before_forwarding(self, served: _Served) -> None:
        served.proxy.add(Fault("PUT", "", ResetConnection(), times=1))
        with pytest.raises(ConnectionError):
            served.ask("PUT", "/a", b"x")
        served.connection.close()
        assert served.kept == {}
        assert served.proxy.requests[0].status is None
        assert served.ask("PUT", "/a", b"x").status == 200

    def test_a_reset_within_the_request(self, served: _Served) -> None:
        served.proxy.add(Fault("PUT", "", ResetConnection(after_request_bytes=500_000)))
        with pytest.raises(ConnectionError):
            served.ask("PUT", "/a", CONTENT)
        assert served.kept == {}
        assert served.proxy.requests[0].request_body_bytes >= 500_000

    def test_a_reset_within_the_response(self, served: _Served) -> None:
        served.proxy.add(Fault("GET", "", ResetConnection(after_response_bytes=1000)))
        with pytest.raises((ConnectionError, http.client.IncompleteRead)):
            served.get("/a")
        assert served.proxy.requests[0].status == 200
        assert served.proxy.bytes_down == 1000

    def test_a_lost_answer(self, served: _Served) -> None:
        served.proxy.add(Fault("PUT", "", DropAnswer()))
        with pytest.raises(ConnectionError):
            served.ask("PUT", "/a", CONTENT)
        assert served.kept == {"/a": CONTENT}
        assert served.proxy.requests[0].status is None

    def test_a_truncated_body(self, served: _Served) -> None:
        served.proxy.add(Fault("GET", "", TruncateBody(keep=1000)))
        answer = served.ask("GET", "/a")
        assert answer.headers["Content-Length"] == str(len(CONTENT))
        with pytest.raises(http.client.IncompleteRead) as caught:
            answer.read()
        assert caught.value.partial == CONTENT[:1000]
        served.connection.close()
        with pytest.raises(http.client.IncompleteRead):
            served.get("/chunked")

    def test_a_body_that_is_short_without_http_noticing(self, served: _Served) -> None:
        served.proxy.add(Fault("GET", "", ShortenBody(keep=1000)))
        for path in ("/a", "/chunked"):
            answer = served.ask("GET", path)
            assert (answer.read(), answer.status) == (CONTENT[:1000], 200)
            assert answer.headers["ETag"] == '"right"'

    def test_altered_bodies(self, served: _Served) -> None:
        served.proxy.add(
            Fault("GET", "", AlterResponseBody(offset=300_000)), Fault("PUT", "", AlterRequestBody(offset=300_000))
        )
        altered = CONTENT[:300_000] + bytes([CONTENT[300_000] ^ 1]) + CONTENT[300_001:]
        assert served.get("/x") == served.get("/chunked") == altered
        served.ask("PUT", "/a", CONTENT).read()
        served.ask("PUT", "/b", iter([CONTENT]), Transfer_Encoding="chunked").read()
        assert served.kept == {"/a": altered, "/b": altered}

    def test_other_headers(self, served: _Served) -> None:
        served.proxy.add(Fault("GET", "", WrongEtag('"wrong"')), Fault("GET", "", DropResponseHeaders("X-Amz-Check*")))
        answer = served.ask("GET", "/a")
        assert answer.read() == CONTENT
        assert answer.headers.get_all("ETag") == ['"wrong"']
        assert "x-amz-checksum-crc32" not in answer.headers
        served.proxy.add(Fault("PUT", "", DropRequestHeaders("if-none-match", "x-amz-checksum-*")))
        served.ask("PUT", "/a", b"", If_None_Match="*", X_Amz_Checksum_SHA256="x", X_Amz_Meta_A="kept").read()
        assert {"if-none-match", "x-amz-checksum-sha256"} & set(served.headers_seen[0]) == set()
        assert served.headers_seen[0]["x-amz-meta-a"] == "kept"

    def test_dropping_signed_headers_signs_again(self, s3: S3Server, bucket: str) -> None:
        at = {"Bucket": bucket, "Key": "a/ä key"}
        with FaultProxy(s3) as proxy:
            client = s3.at(proxy.endpoint_url).client()
            proxy.add(Fault("*", "", DropRequestHeaders("If-None-Match", "x-amz-checksum-*")))
            for content in (b"first", b"second"):
                client.put_object(**at, Body=content, IfNoneMatch="*")
            assert client.list_objects_v2(Bucket=bucket, Prefix="a/ä", Delimiter="/")["KeyCount"] == 1
            assert client.get_object(**at)["Body"].read() == b"second"

    def test_slow_for_a_bounded_time(self, served: _Served) -> None:
        served.proxy.add(Fault("GET", "/down", Trickle(100_000, seconds=0.5)))
        served.proxy.add(Fault("PUT", "/up", Trickle(0, seconds=0.5, upload=True)))
        served.proxy.add(Fault("GET", "/later", Delay(0.5)))
        for ask in (
            lambda: served.get("/down"),
            lambda: served.ask("PUT", "/up", CONTENT).read(),
            lambda: served.get("/later"),
        ):
            started = time.monotonic()
            ask()
            assert 0.4 < time.monotonic() - started < 60
        assert served.kept == {"/up": CONTENT}

    @pytest.mark.parametrize("action", [AlterResponseBody(10**9), TruncateBody(10**9), ShortenBody(10**9)], ids=repr)
    def test_a_fault_that_cannot_happen_fails_the_test(self, served: _Served, action: Action) -> None:
        with pytest.raises(ValueError, match=str(10**9)), FaultProxy(_url(served.proxy.upstream)) as proxy:
            proxy.add(Fault("GET", "", action))
            connection = http.client.HTTPConnection(proxy.endpoint_url.removeprefix("http://"), timeout=20)
            connection.request("GET", "/a")
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                connection.getresponse().read()

    def test_a_server_that_is_not_there_is_a_reset(self) -> None:
        with FaultProxy("http://127.0.0.1:1") as proxy:
            connection = http.client.HTTPConnection(proxy.endpoint_url.removeprefix("http://"), timeout=20)
            with pytest.raises(ConnectionError):
                connection.request("GET", "/a")
                connection.getresponse()

    def test_leaving_ends_open_connections(self, served: _Served) -> None:
        with FaultProxy(_url(served.proxy.upstream)) as proxy:
            proxy.add(Fault("GET", "/slow", Trickle(10, seconds=600)))
            address = urlsplit(proxy.endpoint_url)
            idle = socket.create_connection((address.hostname, address.port), 10)
            busy = socket.create_connection((address.hostname, address.port), 10)
            busy.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            busy.recv(10)
            started = time.monotonic()
        assert time.monotonic() - started < 60
        with idle, busy, contextlib.suppress(ConnectionError):
            assert idle.recv(10) == b""

    def test_a_large_body_is_not_kept_in_memory(self, served: _Served) -> None:
        piece = b"x" * MB
        before = psutil.Process().memory_info().rss
        with FaultProxy(_url(served.proxy.upstream)) as proxy:
            connection = http.client.HTTPConnection(proxy.endpoint_url.removeprefix("http://"), timeout=20)
            proxy.add(Fault("PUT", "", ResetConnection(after_request_bytes=299 * MB)))
            peak = before
            with contextlib.suppress(ConnectionError):
                connection.putrequest("PUT", "/sink")
                connection.putheader("Content-Length", str(300 * MB))
                connection.endheaders()
                for _ in range(300):
                    connection.send(piece)
                    peak = max(peak, psutil.Process().memory_info().rss)
        assert peak - before < 100 * MB


def _url(address: tuple[str, int]) -> str:
    return f"http://{address[0]}:{address[1]}"
