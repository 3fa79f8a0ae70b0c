"""What the shell completes: names, versions, aliases, recipes, checks and scorers. A broken home completes nothing."""

from collections.abc import Callable, Iterable, Iterator

from slmops.deployments.cli.running import the_registry

Completion = Callable[[str], list[str]]


def _quietly(candidates: Callable[[str], Iterable[str]]) -> Completion:
    """Return the candidates that begin with the typed text; none if they cannot be found."""

    def complete(incomplete: str) -> list[str]:
        try:
            return [text for text in candidates(incomplete) if text.startswith(incomplete)]
        except Exception:  # a message here would end up in the line that the user is typing
            return []

    return complete


def _names(incomplete: str) -> list[str]:
    return the_registry().names()


def _references(incomplete: str) -> Iterator[str]:
    registry = the_registry()
    name, at, _ = incomplete.partition("@")
    if not at:
        yield from registry.names()
    else:
        yield from (f"{name}@{alias}" for alias in registry.aliases(name))
        yield from (version.reference for version in registry.versions(name))


def _of_stages(parameter: str) -> Completion:
    def choices(incomplete: str) -> Iterable[str]:
        from slmops.tasks.choices import CHOICES

        return CHOICES[parameter]

    return _quietly(choices)


def one_of(values: Iterable[str]) -> Completion:
    """Complete one of a few values."""
    return _quietly(lambda incomplete: values)


names, references = _quietly(_names), _quietly(_references)
recipes, checks, scorers = _of_stages("recipes"), _of_stages("allow"), _of_stages("scorer")

# Of the parameters of runs, by name.
OF_PARAMETERS: dict[str, Completion] = {
    "name": names,
    "reference": references,
    "recipes": recipes,
    "allow": checks,
    "scorer": scorers,
}
