"""A client of an S3 server by the store's settings, and S3's errors as messages for users."""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from slmops.infra.errors import BadInput, PassingFault, StageFailed
from slmops.infra.settings import StoreSettings

if TYPE_CHECKING:
    from botocore.loaders import Loader
    from mypy_boto3_s3 import S3Client

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
ATTEMPTS = 5
CONNECTIONS = 16

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_IP_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")
# "Safe characters": https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
_SEGMENT = re.compile(r"[A-Za-z0-9!_.*'()=-]{1,255}")
_PREFIX_BYTES = 512  # a key has at most 1,024 bytes, and the longest key below the prefix about 200

_KEYS = "Set SLMOPS_STORE__ACCESS_KEY_ID and SLMOPS_STORE__SECRET_ACCESS_KEY, or log in with AWS's tools."
_PERMISSIONS = (
    "It needs s3:ListBucket on the bucket, and s3:GetObject, PutObject, DeleteObject, AbortMultipartUpload below the "
    "prefix."
)
_WRONG_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_FORBIDDEN = {"403", "AccessDenied", "AllAccessDisabled", "AccountProblem", "UnauthorizedAccess"}
_NO_BUCKET = {"NoSuchBucket", "InvalidBucketName"}
_OTHER_REGION = {"301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_FULL = {"507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "ServiceQuotaExceeded"}
_PASSING = {"408", "429", "SlowDown", "RequestTimeout", "TooManyRequests", "OperationAborted"}
_PASSING |= {"ConditionalRequestConflict", "BadDigest", "XAmzContentSHA256Mismatch", "InvalidPart"}
NOT_FOUND = {"404", "NoSuchKey", "NotFound"}
# Error codes of servers for a body that does not match the SHA-256 sent with it.
BAD_CHECKSUM = {
    "BadDigest",
    "InvalidDigest",
    "InvalidRequest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "ChecksumMismatch",
}
NO_UPLOAD = NOT_FOUND | {"NoSuchUpload"}


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """Split `s3://BUCKET[/PREFIX]` into bucket and prefix (no slash at either end, may be empty).

    Raises `BadInput` for a bucket that S3 does not allow, and for a prefix of more than 512 bytes or with anything but
    letters, digits and `! - _ . * ' ( ) =` between its slashes; a user or a password is not shown.
    """
    if "@" in uri:
        raise BadInput(
            "The store's address contains a user or a password.",
            f"Write s3://BUCKET/PREFIX. {_KEYS}",
            code="s3-address-not-valid",
        )
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.removesuffix("/")
    if scheme != "s3" or not _BUCKET.fullmatch(bucket) or ".." in bucket or _IP_ADDRESS.fullmatch(bucket):
        raise BadInput(
            f"{uri[:200]!r} names no bucket.",
            "Write s3://BUCKET/PREFIX; a bucket has 3 to 63 lower-case letters, digits, dots and hyphens.",
            code="s3-address-not-valid",
        )
    segments = prefix.split("/") if prefix else []
    bad = next((segment for segment in segments if not _SEGMENT.fullmatch(segment) or segment in (".", "..")), None)
    if bad is not None or len(prefix.encode()) > _PREFIX_BYTES:
        fault = f"it is longer than {_PREFIX_BYTES} bytes" if bad is None else f"{bad[:80]!r} is not allowed in it"
        raise BadInput(
            f"The prefix of {uri[:200]!r} is not valid: {fault}.",
            "Use letters, digits, hyphens, dots and underscores between single slashes.",
            code="s3-address-not-valid",
        )
    return bucket, prefix


def make_client(settings: StoreSettings) -> "S3Client":
    """Return a client for the settings' endpoint, region, profile and keys; each defaults to the usual AWS chain.

    A custom server is addressed path-style unless the settings say otherwise. Raises `BadInput` for settings from which
    no client can be made, and for a SOCKS proxy on the way.
    """
    import boto3
    import botocore.session
    from botocore.config import Config

    endpoint_url = settings.endpoint_url
    if endpoint_url:
        _check_endpoint(endpoint_url)
    style = settings.addressing_style or ("path" if endpoint_url else "auto")
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        max_pool_connections=CONNECTIONS,
        # The SHA-256 that the store sends or reads back protects bodies. A second SHA-256 in the signature, and a CRC,
        # would only cost time.
        s3={"addressing_style": style, "payload_signing_enabled": False},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    secret = settings.secret_access_key
    with s3_errors(endpoint_url or "S3"):
        core = botocore.session.get_session()
        core.lazy_register_component("data_loader", lambda: _kept_loader(core.get_config_variable("data_path")))
        session = boto3.session.Session(
            botocore_session=core, profile_name=settings.profile, region_name=settings.region
        )
        client = session.client(
            "s3",
            endpoint_url=endpoint_url,
            aws_access_key_id=settings.access_key_id,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            # A custom server has no regions, but requests are signed with one.
            region_name=session.region_name or ("us-east-1" if endpoint_url else None),
            config=config,
        )
    _check_proxy(client.meta.endpoint_url)
    return client


@functools.cache
def _kept_loader(data_path: str | None) -> "Loader":
    """Return botocore's loader of service descriptions; cached, because loading takes most of a client's start."""
    from botocore.loaders import create_loader

    return create_loader(data_path)


def _check_endpoint(url: str) -> None:
    if "@" in url:  # at any position, because a malformed address may still contain a password
        raise BadInput("The endpoint SLMOPS_STORE__ENDPOINT_URL contains a user or a password.", _KEYS)
    if not _is_endpoint(url):
        raise BadInput(
            f"The endpoint {url.partition('?')[0][:200]!r} is not valid.",
            "Write SLMOPS_STORE__ENDPOINT_URL=https://HOST, or https://HOST:PORT.",
        )


def _check_proxy(address: str) -> None:
    from botocore.utils import get_environ_proxies

    scheme = urlsplit(address).scheme
    if _is_socks(get_environ_proxies(address).get(scheme, "")):
        variable = f"{scheme.upper()}_PROXY"
        raise BadInput(
            f"{variable} names a SOCKS proxy, and an S3 store is reached directly or through an HTTP proxy only.",
            f"Name an HTTP proxy in {variable}, or add {urlsplit(address).hostname} to NO_PROXY.",
            code="s3-socks-proxy",
        )


def _is_socks(proxy: str) -> bool:
    return proxy.lower().startswith("socks")


def _is_endpoint(url: str) -> bool:
    if not re.fullmatch(r"[!-~]+", url):
        return False
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for a port that is not a number, or is too high
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment


@contextmanager
def s3_errors(what: str) -> Iterator[None]:
    """Turn errors of S3 or of the connection into slmops's errors; `what` is the requested address.

    botocore's own texts are not passed on whole, because some quote the request. A missing key raises `KeyError`, a
    refused conditional write raises botocore's own error.
    """
    from boto3.exceptions import Boto3Error, RetriesExceededError
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        CredentialRetrievalError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
        ProfileNotFound,
        SSLError,
        SSOError,
    )
    from s3transfer.exceptions import CancelledError, S3DownloadFailedError, S3ValidationError
    from s3transfer.exceptions import RetriesExceededError as TransferRetriesExceededError

    broken_off: tuple[type[Exception], ...] = (RetriesExceededError, TransferRetriesExceededError, *cut_off())
    broken_off += (S3DownloadFailedError, S3ValidationError, CancelledError)
    try:
        yield
    except ProfileNotFound:
        raise BadInput(
            f"{what}: AWS's configuration has no profile of that name.", "Correct SLMOPS_STORE__PROFILE or AWS_PROFILE."
        ) from None
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, SSOError):
        raise BadInput(f"There are no credentials for {what}.", _KEYS, code="s3-credentials-missing") from None
    except ClientError as error:
        raise _in_words(what, error) from None
    except SSLError:
        raise BadInput(
            f"{what}: the server's certificate cannot be verified.",
            "Set AWS_CA_BUNDLE to its authority's certificates, or correct SLMOPS_STORE__ENDPOINT_URL.",
        ) from None
    except broken_off:
        raise PassingFault(
            f"{what}: the connection was interrupted repeatedly.", "Try again.", "s3-interrupted"
        ) from None
    except (ConnectionError, HTTPClientError) as error:
        # botocore does not read this variable: it has tried to reach the server directly.
        ignored = _is_socks(getproxies().get("all", ""))
        socks = " ALL_PROXY names a SOCKS proxy, which is not used for S3: name an HTTP proxy in HTTPS_PROXY."
        raise PassingFault(
            f"{what}: the server cannot be reached ({type(error).__name__}).",
            f"Check SLMOPS_STORE__ENDPOINT_URL and the network.{socks if ignored else ''}",
            code="s3-unreachable",
        ) from None
    except (BotoCoreError, Boto3Error, ValueError) as error:
        raise BadInput(
            f"{what} cannot be used with these settings ({type(error).__name__}).",
            "Check SLMOPS_STORE__ENDPOINT_URL, keys and AWS's configuration.",
        ) from None


def cut_off() -> tuple[type[Exception], ...]:
    """Return the errors of a response that ended too early, after which botocore does not retry."""
    from botocore.exceptions import IncompleteReadError, ResponseStreamingError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return IncompleteReadError, ResponseStreamingError, ResponseParserError, HTTPError


def error_code(error: Any) -> str:
    """Return the code of a botocore `ClientError`, such as `NoSuchKey`; for a HEAD it is the HTTP status."""
    return str(error.response.get("Error", {}).get("Code", "an unknown error"))


def http_status(error: Any) -> int:
    """Return the HTTP status of a botocore `ClientError`."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _in_words(what: str, error: Any) -> Exception:
    code, status = error_code(error), http_status(error)
    headers: Mapping[str, str] = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
    if code in NOT_FOUND:
        return KeyError(what)
    if code in _OTHER_REGION or (status == 400 and region):
        return BadInput(
            f"{what}: the request was signed for another region than the bucket's.",
            f"Set SLMOPS_STORE__REGION={region}." if region else "Set SLMOPS_STORE__REGION to the bucket's.",
        )
    refused = {
        **dict.fromkeys(
            _NO_BUCKET, ("s3-no-bucket", "there is no such bucket", "Correct the bucket's name or the endpoint.")
        ),
        **dict.fromkeys(_WRONG_KEYS, ("s3-credentials-refused", f"the server refuses the credentials ({code})", _KEYS)),
        **dict.fromkeys(
            _FORBIDDEN,
            (
                "s3-forbidden",
                f"the server refuses the credentials, or they lack a permission ({code})",
                _PERMISSIONS,
            ),
        ),
        "RequestTimeTooSkewed": (
            "s3-clock",
            f"this machine's clock is {_skew(headers)} the server's",
            "Set the clock (NTP).",
        ),
    }
    if code in refused:
        kind, fault, advice = refused[code]
        return BadInput(f"{what}: {fault}.", advice, code=kind)
    if code in _FULL:
        return StageFailed(f"{what}: the server has no room left ({code}).", "Free space there, or run slmops gc.")
    if status >= 500 or code in _PASSING:
        return PassingFault(f"{what}: the server answered with {code}.", "Try again.", code="s3-server-failed")
    return StageFailed(f"{what}: the server answered with {code}.", "Look the code up in the server's documentation.")


def _skew(headers: Mapping[str, str]) -> str:
    with contextlib.suppress(KeyError, ValueError, TypeError):
        seconds = (datetime.now(UTC) - parsedate_to_datetime(headers["date"])).total_seconds()
        return f"{abs(seconds) / 60:,.0f} minutes {'ahead of' if seconds > 0 else 'behind'}"
    return "too far from"
