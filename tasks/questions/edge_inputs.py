"""Edge inputs: valid or nearly valid conversations that ordinary tests omit."""

import string
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CONTROL_TOKENS = 8
# What the weights can change: memory and figures at the longest prompt, and the embeddings of tokens that training
# rarely saw. The outcome of every other input follows from the runtime, the tokenizer and the chat template.
OF_THE_WEIGHTS = frozenset({"longer than the context", "10,000 repeats of one character", "odd code points"})

_CONTROL_CHARACTERS = "".join(map(chr, [*range(1, 0x20), *range(0x7F, 0xA0)]))
# Families joined by zero-width joiners, skin tones, flags of two letters and of tags, a keycap.
_EMOJI = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 "
    "\U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 "
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f 7\ufe0f\u20e3 \u2764\ufe0f\u200d\U0001f525"
)
# Arabic, Hebrew, and an override that reverses the following text.
_RIGHT_TO_LEFT = "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd 123 \u202eabc\u202c \u200f!"
_MIXED_SCRIPTS = (
    "Latin \u041a\u0438\u0440\u0438\u043b\u043b \u0395\u03bb\u03bb\u03ac\u03b4\u03b1 \u6771\u4eac \ud55c\uad6d\uc5b4 "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 \u10e5\u10d0\u10e0\u10d7\u10e3\u10da\u10d8 \u1218\u120d"
)
_ODD_CODE_POINTS = "\ufeff\ufffd\ufffe\uffff\ue000\U0010ffff\u2028\u2029\u00ad"
_QUOTES = '{"a": "\\"", \'b\': [\\u0000, \\x, \\\\], }]} """ ``` \\' * 4
_TEMPLATE_SYNTAX = "{{ 7 * 7 }} {% for m in messages %}{{ m.__class__ }}{% endfor %} {# %s %n ${x} {0} #} {%"


@dataclass(frozen=True)
class ControlToken:
    """A special token of a model's vocabulary."""

    text: str
    id: int


@dataclass(frozen=True)
class EdgeInput:
    """A named conversation of {role, content}; `control_tokens` are those in a user's message."""

    name: str
    messages: tuple[dict[str, str], ...]
    control_tokens: tuple[ControlToken, ...] = ()

    @property
    def depends_on_weights(self) -> bool:
        """Whether two variants with the same files but the weights may differ in its outcome."""
        return self.name in OF_THE_WEIGHTS


def edge_inputs(context_length: int, control_tokens: Sequence[ControlToken]) -> tuple[EdgeInput, ...]:
    """Return the edge inputs for a model with a context of `context_length` tokens.

    Without control tokens, the input that contains them is left out.
    """
    inputs = [
        _typed("empty text", ""),
        _typed("white space only", " \n\t\r\u00a0\u2003\u3000 "),
        # A word and a space are at least one token.
        _typed("longer than the context", "word " * (context_length + 1)),
        _typed("NUL character", "Turn on\0 the lights."),
        _typed("control characters", f"Turn{_CONTROL_CHARACTERS}on."),
        _typed("emoji", _EMOJI),
        _typed("right to left", _RIGHT_TO_LEFT),
        _typed("mixed scripts", _MIXED_SCRIPTS),
        _typed("combining marks", "e" + "\u0301\u0323\u0336" * 30),
        _typed("odd code points", _ODD_CODE_POINTS),
        # Half a surrogate pair: JSON can express it, UTF-8 cannot.
        _typed("unpaired surrogate", "a\ud83d b\udc00"),
        _typed("10,000 repeats of one character", "a" * 10_000),
        _typed("very long word", "".join(string.ascii_letters[i * i % 52] for i in range(1_000))),
        _typed("very long number", "1234567890" * 30),
        _typed("500 line breaks", "\n" * 500 + "x"),
        _typed("quotes and backslashes", _QUOTES),
        _typed("template syntax", _TEMPLATE_SYNTAX),
        _turns("empty assistant turn", ("user", "Hello."), ("assistant", ""), ("user", "And now?")),
        _turns("empty system message", ("system", ""), ("user", "Hello.")),
        _turns("two user turns in a row", ("user", "Hello."), ("user", "And now?")),
        _turns("system message alone", ("system", "You answer briefly.")),
        _turns("assistant has the last word", ("user", "Hello."), ("assistant", "Hello")),
        _turns("no message"),
    ]
    if control_tokens:
        text = " ".join(["What is", *(token.text for token in control_tokens), "?"])
        inputs.append(EdgeInput("control tokens typed by a user", _typed("", text).messages, tuple(control_tokens)))
    return tuple(inputs)


def _typed(name: str, text: str) -> EdgeInput:
    return _turns(name, ("user", text))


def _turns(name: str, *turns: tuple[str, str]) -> EdgeInput:
    return EdgeInput(name, tuple({"role": role, "content": content} for role, content in turns))
