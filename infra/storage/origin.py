"""Evidence that was copied with a version is a claim of its origin, and is marked as such."""

import json
from contextlib import suppress

# The field of such a record with the SHA-256 of the manifest that it was copied from.
COPIED_FROM = "copied_from"


def marked(record: bytes, manifest: str, origin: str) -> bytes:
    """Return a record for a copied version; `manifest` and `origin` are the digests of its manifests here and there."""
    return _to_json({**json.loads(record), "manifest": manifest, COPIED_FROM: origin})


def unmarked(record: bytes) -> bytes:
    """Return a record as it was before it was copied under the same number, and any other record unchanged."""
    with suppress(ValueError, TypeError, KeyError):  # another module checks whether this is a record at all
        content = json.loads(record)
        if content["manifest"] == content.pop(COPIED_FROM):
            return _to_json(content)
    return record


def _to_json(record: dict[str, object]) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
