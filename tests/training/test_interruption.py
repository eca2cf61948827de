"""Ctrl-C at every line of SAM's climb and way back, once and again: the weights are back, to the bit."""

import contextlib
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from fmsam_lib.training import interruption, sam
from fmsam_lib.training.sam import SAM
from tests.training.test_sam import model, same, state

FILES = (contextlib.__file__, interruption.__file__, sam.__file__)


@pytest.fixture(autouse=True)
def _listens():
    """A shell that starts `make test` in the background has it ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_at(line):
    """Has the process interrupted at the `line`-th line from here of the files that move the weights and put them back.

    Gives a list of the lines that were passed; an interruption ends the tracing.
    """
    passed = []

    def trace(frame, event, _):
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            passed.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
            if len(passed) == line:
                signal.raise_signal(signal.SIGINT)
        return trace

    return passed, trace


def climb(line):
    """One climb, interrupted at that line: the network, what it was before, the lines passed, what stopped it."""
    net, loss = model()
    loss().backward()
    saved, climber = state(net), SAM(net.parameters(), rho=0.3, net=net)
    passed, trace = interrupted_at(line)
    sys.settrace(trace)
    try:
        with climber.perturbed():
            net.zero_grad()
            loss().backward()
    except KeyboardInterrupt as error:
        return net, saved, passed, error  # whose frames keep the block's generator, as a notebook does
    finally:
        sys.settrace(None)
    return net, saved, passed, None


def test_an_interruption_at_any_line_leaves_the_weights():
    *_, whole, stopped = climb(0)
    assert stopped is None
    assert len(whole) > 60
    for line in range(1, len(whole) + 1):
        net, saved, passed, stopped = climb(line)
        assert stopped is not None
        assert same(net, saved), passed[-1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, passed[-1]


@pytest.mark.parametrize("hits", [{1}, {2}, {3}, {1, 2, 3}, {2, 3, 4, 5}])
def test_a_second_interruption_while_weights_are_copied_back_leaves_none_behind(monkeypatch, hits):
    """The copying of these numbers is interrupted when half of it is done."""
    net, loss = model()
    loss().backward()
    saved, copy, count = state(net), torch._foreach_copy_, 0

    def half(tensors, values):
        nonlocal count
        count += 1
        copy(tensors[:1], values[:1])
        if count in hits:
            signal.raise_signal(signal.SIGINT)
        copy(tensors[1:], values[1:])

    with pytest.raises(KeyboardInterrupt), SAM(net.parameters(), rho=0.3, net=net).perturbed():  # noqa: PT012
        assert not same(net, saved)
        monkeypatch.setattr(torch, "_foreach_copy_", half)
        signal.raise_signal(signal.SIGINT)
    assert count >= min(hits)
    assert same(net, saved)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_only_takes_note_of_ctrl_c_lets_the_climb_go_on():
    """As notebook 10 does, whose training ends behind the step."""
    net, loss = model()
    loss().backward()
    saved, noted = state(net), []
    before = signal.signal(signal.SIGINT, lambda *_: noted.append(1))
    try:
        with SAM(net.parameters(), rho=0.3, net=net).perturbed():
            signal.raise_signal(signal.SIGINT)
            assert noted
            assert not same(net, saved)
        assert same(net, saved)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_climb_in_a_thread_of_its_own_needs_no_handler():
    net, loss = model()
    loss().backward()
    saved, seen = state(net), []

    def run():
        with SAM(net.parameters(), rho=0.3, net=net).perturbed():
            seen.append(same(net, saved))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert seen == [False]
    assert same(net, saved)
