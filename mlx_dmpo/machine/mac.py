"""What macOS does to a long run: sleep, the display watchdog, swap, a wired limit, Low Power Mode

Nothing here acts on another system. A tool that is missing, fails or hangs is passed over.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator

from . import console

SECONDS = 2.0  # that a tool may take
SWAP = 0.5e9  # bytes in swap that are worth a line: macOS leaves some there for ever
WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"  # read by Apple's GPU driver when a process first uses the GPU
_BYTES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def here() -> bool:
    """Whether this is a Mac."""
    return sys.platform == "darwin"


def _output(*command: str) -> str:
    """What a command prints; "" where it is missing, fails, or is not done in time."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, encoding="utf-8", errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


@contextlib.contextmanager
def awake(wanted: bool = True) -> Iterator[None]:
    """This Mac does not fall asleep by itself inside the block. Should this process be killed, `-w` ends it too."""
    process = None
    if wanted and here():
        try:  # a session of its own: Ctrl-C lets the run finish its step, and must not end this before
            process = subprocess.Popen(
                ["caffeinate", "-i", "-w", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            console.notice(f"note: caffeinate cannot be started ({error.strerror}): keep this Mac awake by hand")
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def notes(needed: float = 0.0, *, awake: bool = True) -> list[str]:
    """What on this Mac slows or ends a long run, a line each with its fix; none elsewhere.

    needed  bytes that the run needs at its highest; 0 where that is not known
    awake   whether the run keeps the Mac awake
    """
    if not here():
        return []
    power = _output("pmset", "-g")
    found = [_watchdog(), _swap(_output("sysctl", "-n", "vm.swapusage"))]
    found += [_wired(_output("sysctl", "-n", "iogpu.wired_limit_mb"), needed), _low_power(power)]
    return [line for line in [*found, "" if awake else _sleep(power)] if line]


def _watchdog() -> str:
    if os.environ.get(WATCHDOG) == "1":
        return ""
    return (
        "macOS may end GPU work that holds up the display (the error says ImpactingInteractivity): "
        f"if it does, run `export {WATCHDOG}=1` first"
    )


def _swap(usage: str) -> str:
    """usage: `total = 2048.00M  used = 1024.50M  free = 1023.50M  (encrypted)`, in some languages with commas."""
    found = re.search(r"used\s*=\s*(\d+(?:[.,]\d+)?)([KMGT])", usage)
    used = float(found[1].replace(",", ".")) * _BYTES[found[2]] if found else 0.0
    return (
        f"{used / 1e9:.1f} GB are in swap, where a run waits for the disk: close other programs" if used > SWAP else ""
    )


def _wired(limit: str, needed: float) -> str:
    """limit: megabytes; 0 is macOS's own."""
    megabytes = int(limit) if re.fullmatch(r"\s*\d{1,9}\s*", limit) else 0
    if not 0 < megabytes * 2**20 < needed:
        return ""
    return (
        f"iogpu.wired_limit_mb is {megabytes:,} MB, and this needs {needed / 2**20:,.0f}: "
        "run `sudo sysctl iogpu.wired_limit_mb=0`, which restores macOS's own limit"
    )


def _low_power(power: str) -> str:
    on = re.search(r"^\s*(?:lowpowermode|powermode)\s+1\b", power, re.MULTILINE)
    return "Low Power Mode is on, which slows the GPU: turn it off in System Settings > Battery" if on else ""


def _sleep(power: str) -> str:
    found = re.search(r"^\s*sleep\s+([1-9]\d*)", power, re.MULTILINE)
    if not found:
        return ""
    return f"this Mac sleeps after {found[1]} idle minutes, and a run stops meanwhile: leave out --no-caffeinate"
