"""What `slmops serve` answers against the OpenAPI document that it publishes, by schemathesis."""

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.support.served_models import RunningServer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serve")]


def test_no_request_gets_an_answer_that_the_document_does_not_describe(model_server: RunningServer) -> None:
    """Requests to every path, in its form and against it: no 5xx, no hang, only statuses and forms of the document."""
    document = schemathesis.openapi.from_url(f"{model_server.url}/openapi.json")
    tried = set()
    for found in document.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        @given(st.one_of([operation.as_strategy(generation_mode=mode) for mode in GenerationMode]))
        def check(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict):  # a model of this server, and few tokens of it
                case.body |= {"model": "home", "max_completion_tokens": 2}
            # What the template or the runtime would not take, such as an empty message, has the document's form.
            case.call_and_validate(session=session, timeout=60, excluded_checks=[positive_data_acceptance])

        with requests.Session() as session:
            check()
        tried.add(operation.path)
    assert tried == set(httpx.get(f"{model_server.url}/openapi.json").json()["paths"])
