# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Programs that start several processes, which talk over the loopback interface."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys


def launch(module: str, *arguments: str, deadline: float) -> None:
    """Runs a launcher, a module of Python, which ends with everything that it has started after a deadline."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = process.communicate(timeout=deadline)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # of which the launcher tells its processes, groups of their own
            process.wait(deadline)
    assert process.returncode == 0, output
