"""The tool demo's main job, with its full training, in two and a half minutes.

Run as `python -m pytest tests/benchmarks/tool_demo.py`; `make test` has its parts, on less. With SLMOPS_HOME the demo
is made there, and a demo that is there is not trained again.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.tasks.training.tool_demo import NO_TOOL, TOOLS
from tests.e2e.conftest import SMALL, Slmops
from tests.support.served_models import RunningServer, serving

EVALUATED = {"SLMOPS_EVALUATION__MAX_ROWS": "60", "SLMOPS_EVALUATION__MAX_NEW_TOKENS": "112"}
KITCHEN: Any = {"role": "user", "content": "Set the kitchen to 21 degrees"}
ASKED: Any = {"model": "home-tools", "tools": list(TOOLS), "max_tokens": 112}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The home and the report of `slmops demo --tools`."""
    home = Path(os.environ.get("SLMOPS_HOME") or tmp_path_factory.mktemp("tool-demo") / "home")
    return home, Slmops(home).json("demo", "--tools", **{**SMALL, **EVALUATED})


@pytest.fixture(scope="module")
def server(deployed: tuple[Path, dict[str, Any]]) -> Iterator[RunningServer]:
    """`slmops serve` with the tool demo."""
    with serving(deployed[0], "home-tools") as running:
        yield running


def test_three_precisions_are_registered_with_the_tool_checks(deployed: tuple[Path, dict[str, Any]]) -> None:
    _, report = deployed
    assert [variant["status"] for variant in report["variants"]] == ["registered"] * 3
    for variant in report["variants"]:
        checks = {check["name"]: check for check in variant["gate"]["checks"]}
        for name in ("tool_calls_lost", "tool_calls_invented", "tool_arguments_changed"):
            assert checks[name]["passed"]
            assert checks[name]["low"] <= checks[name]["value"] <= checks[name]["high"]
        assert variant["metrics"]["right_functions"] >= 0.9
        assert variant["metrics"]["right_arguments"] >= 0.9


def test_a_call_its_result_the_final_text_and_no_call(server: RunningServer) -> None:
    create = server.client().chat.completions.create
    (choice,) = create(messages=[KITCHEN], **ASKED).choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "set_temperature"
    assert json.loads(call.function.arguments) == {"room": "kitchen", "degrees": 21}
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "ok"}
    assert create(messages=[KITCHEN, choice.message, result], **ASKED).choices[0].message.content == "Done."
    timer: Any = {"role": "user", "content": "Set a timer for 10 minutes"}
    assert create(messages=[timer], **ASKED).choices[0].message.content == NO_TOOL


def test_an_agent_of_pydantic_ai_calls_two_tools_in_three_turns(server: RunningServer) -> None:
    """An agent library's own loop, whose later turns have the earlier ones with their calls and results."""
    from pydantic_ai import Agent, Tool
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    done = list[tuple[str, dict[str, Any]]]()

    def noting(name: str) -> Callable[..., str]:
        def call(**arguments: Any) -> str:
            done.append((name, arguments))
            return "ok"

        return call

    described = [tool["function"] for tool in TOOLS]
    tools = [Tool.from_schema(noting(d["name"]), d["name"], d["description"], d["parameters"]) for d in described]
    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    agent = Agent(OpenAIChatModel("home-tools", provider=provider), tools=tools)
    answers, history = list[str](), list[Any]()
    for question in ("Turn on the hallway light", "Set the kitchen to 21 degrees", "Turn the garage light off"):
        turn = agent.run_sync(question, message_history=history)
        answers.append(turn.output)
        history = turn.all_messages()
    assert done == [
        ("set_light", {"room": "hallway", "on": True}),
        ("set_temperature", {"room": "kitchen", "degrees": 21}),
        ("set_light", {"room": "garage", "on": False}),
    ]
    assert answers == ["Done."] * 3
