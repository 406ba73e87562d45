"""The load generator's own end: what goes wrong at the service's drain is told, and is waited for no longer."""

import types

from benchmarks import serve


def test_a_drain_whose_requests_fail_ends_and_is_told():
    process = types.SimpleNamespace(send_signal=lambda signal: None, wait=lambda seconds: 1)
    server = types.SimpleNamespace(port=1, metrics=lambda: {"alto_requests_in_flight": 0.0}, process=process)
    good = [serve.Good("/v1/segment", b"{}", [[1]], [])]
    flying, answered, code, _, wrong = serve.drain(server, good, clients=3)
    assert (flying, answered, code) == (0, 0, 1)
    assert len(wrong) == 4 and wrong[-1] == "the service ended with 1 after SIGTERM"
    assert all(line.startswith("ConnectionRefusedError") for line in wrong[:3])
