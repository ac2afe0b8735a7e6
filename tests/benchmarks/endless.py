"""Rows of a machine on which something is wrong: one never ends, one kills its process, one raises."""

import os
import signal
import threading

from shoestring.benchmarks.rows.row import Figures, Machine, NotHere


def fine(machine: Machine) -> Figures:
    return {"process": float(os.getpid())}


def endless(machine: Machine) -> Figures:
    threading.Event().wait()
    return {}


def endless_on_last_rank(machine: Machine) -> Figures:
    return endless(machine) if machine.world.rank == machine.world.size - 1 else fine(machine)


def killed(machine: Machine) -> Figures:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def broken(machine: Machine) -> Figures:
    raise RuntimeError("no kernel image\nis available")


def absent(machine: Machine) -> Figures:
    raise NotHere("apex is not installed")
