"""The ledger alone: no device, no meter."""

from bitwatt.telemetry.energy.attribution import Split
from bitwatt.telemetry.energy.ledger import EnergyLedger


def split(*, prefill=(), decode=(), by_request=(), idle=0.0):
    made = Split(idle=idle)
    made.prefill.update(prefill)
    made.decode.update(decode)
    made.by_request.update(by_request)
    return made


def test_a_models_joules_are_those_of_its_steps_and_a_requests_those_while_it_is_open():
    ledger = EnergyLedger()
    ledger.open("a")
    ledger.post(split(prefill={"m": 3.0}, by_request={"a": 2.0, "b": 1.0}, idle=5.0))
    ledger.open("b")
    ledger.post(split(decode={"m": 4.0, "n": 2.0}, by_request={"a": 1.0, "b": 3.0, "c": 2.0}))
    assert (ledger.busy_joules("m"), ledger.busy_joules("n")) == (7, 2)
    assert (ledger.close("a"), ledger.close("b"), ledger.close("c")) == (3, 3, None)
    assert ledger.close("a") is None


def test_a_model_that_ran_nothing_took_nothing():
    assert EnergyLedger().busy_joules("m") == 0


def test_shares_of_the_models_add_up_to_the_split():
    whole = split(prefill={"m": 3.0}, decode={"m": 4.0, "n": 2.0}, idle=6.0)
    whole.unattributed = 1.0
    shares = [whole.shares_of(name, num_sharing=2) for name in "mn"]
    assert shares[0] == {"prefill": 3, "decode": 4, "idle": 3, "unattributed": 0.5}
    assert sum(sum(share.values()) for share in shares) == whole.total
