"""The composed Prefect server, natively: PostgreSQL, Redis, API and background services in processes of their own."""

from collections.abc import Iterator

import httpx
import pytest

from tests.stack import IS_INSTALLED, MISSING, Stack, running_stack
from tests.test_compose import FILE, read_by_compose

pytestmark = [
    pytest.mark.skipif(not IS_INSTALLED, reason=MISSING),
    pytest.mark.xdist_group("stack"),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(read_by_compose(FILE)["services"], tmp_path_factory.mktemp("stack")) as running:
        yield running


def test_the_api_wants_its_authentication(stack: Stack) -> None:
    url = f"{stack.api_url}/flows/filter"
    assert httpx.post(url, json={}).status_code == httpx.codes.UNAUTHORIZED
    assert httpx.post(url, json={}, auth=stack.auth).json() == []
