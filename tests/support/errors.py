"""Which error it was, however its sentences are worded: `check=coded("name-not-valid", "../home")`."""

from slmops.infra.errors import SlmopsError


class coded:
    """Tell whether an error has a code, and names what it must: a file, a version, a number."""

    def __init__(self, code: str, *named: str) -> None:
        self.code, self.named = code, named

    def __call__(self, error: SlmopsError) -> bool:
        return error.code == self.code and all(text in str(error) for text in self.named)

    def __repr__(self) -> str:
        return f"coded({', '.join(map(repr, (self.code, *self.named)))})"
