"""Draw the time line of a deploy: its stages and processes, and the CPU time of each.

Run as `python -m tests.benchmarks.time_line slmops deploy FOLDER --name NAME`, with SLMOPS_HOME set to a new folder.
Prints two Markdown tables. The CPU time of a stage is that of all processes while it runs, so stages side by side
have the same cores. A process is named after its first call; what ends within a sample's interval may be missed.
"""

import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import psutil

SAMPLE_INTERVAL_S = 0.25
STAGE_LINE = re.compile(r"(?P<stage>[^:]+): (?:(?P<minutes>\d+):(?P<rest>\d\d)|(?P<seconds>[\d.]+) s)(?:,.*)?")


@dataclass
class Seen:
    """A process: when it was first and last seen, in s, its CPU time in s, and its peak resident memory in bytes."""

    name: str
    began: float
    ended: float = 0.0
    cpu_s: float = 0.0
    rss_bytes: int = 0


@dataclass
class TimeLine:
    """The stages (name, begin, end in s), the processes, and samples of the time and of all CPU time in s."""

    stages: list[tuple[str, float, float]] = field(default_factory=list)
    processes: dict[tuple[int, float], Seen] = field(default_factory=dict)
    samples: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 0.0)])

    def sample(self, root: psutil.Process, now: float) -> None:
        """Add what the processes have used by now."""
        for process in [root, *root.children(recursive=True)]:
            try:
                times, memory, key = process.cpu_times(), process.memory_info(), (process.pid, process.create_time())
                seen = self.processes.setdefault(key, Seen(_name(process.cmdline()), now))
            except psutil.Error:  # it has ended
                continue
            seen.ended, seen.cpu_s = now, times.user + times.system
            seen.rss_bytes = max(seen.rss_bytes, memory.rss)
        self.samples.append((now, sum(seen.cpu_s for seen in self.processes.values())))

    def cpu_s(self, began: float, ended: float) -> float:
        """Return the CPU time of all processes between two times."""
        return self._used_by(ended) - self._used_by(began)

    def _used_by(self, moment: float) -> float:
        return next((used for at, used in self.samples if at >= moment), self.samples[-1][1])


def _name(command: list[str]) -> str:
    modules = [part for part in command if part.startswith("slmops.")]
    return modules[-1].removeprefix("slmops.") if modules else "the command"


def watch(command: list[str]) -> TimeLine:
    """Run a command to its end."""
    line, started = TimeLine(), time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def read() -> None:
        assert process.stderr
        for text in process.stderr:
            if found := STAGE_LINE.fullmatch(text.strip()):
                minutes, rest, seconds = found["minutes"], found["rest"], found["seconds"]
                took, now = float(seconds or 60 * int(minutes) + int(rest)), time.monotonic() - started
                line.stages.append((found["stage"], now - took, now))

    reader = threading.Thread(target=read)
    reader.start()
    root = psutil.Process(process.pid)
    while process.poll() is None:
        line.sample(root, time.monotonic() - started)
        time.sleep(SAMPLE_INTERVAL_S)
    reader.join()
    return line


def main() -> None:
    """Print the tables."""
    line = watch(sys.argv[1:])
    print("| stage | begins | takes | CPU | cores |\n|---|---|---|---|---|")
    for stage, began, ended in sorted(line.stages, key=lambda stage: stage[1]):
        if (took := ended - began) >= 0.5:
            cpu_s = line.cpu_s(began, ended)
            print(f"| {stage} | {began:.0f} s | {took:.1f} s | {cpu_s:.1f} s | {cpu_s / took:.1f} |")
    print("\n| process | begins | ends | CPU | memory |\n|---|---|---|---|---|")
    for seen in sorted(line.processes.values(), key=lambda seen: -seen.cpu_s):
        if seen.cpu_s >= 0.5:
            memory = f"{seen.rss_bytes / 1e6:.0f} MB"
            print(f"| {seen.name} | {seen.began:.0f} s | {seen.ended:.0f} s | {seen.cpu_s:.1f} s | {memory} |")
    wall_s, cpu_s = line.samples[-1]
    print(f"\n{wall_s:.0f} s, {cpu_s:.0f} CPU-s")


if __name__ == "__main__":
    main()
