"""Every rule has a growth whose trees it takes."""

import pytest

from pyspec.acceptance import RULES, check_laws
from pyspec.acceptance.lenient import LenientAcceptance
from pyspec.drafters.shapes.by_rule import growth_for
from pyspec.drafters.shapes.dyspec import DySpecThreshold


@pytest.mark.parametrize("name", RULES)
def test_a_rule_takes_what_grows_for_it(name):
    rule, growth = RULES[name](), growth_for(name)
    check_laws(growth, rule)  # a policy says how it proposes as a drafter does
    assert growth.proposal == ("deterministic" if rule.siblings is None else "sampled")


def test_which():
    found = {name: type(growth_for(name)).__name__ for name in RULES}
    assert found["exact"] == found["typical"] == "TopPaths"
    assert found["recursive"] == found["traversal"] == "DySpecThreshold"
    assert growth_for("k_seq").branching == growth_for("with_replacement").branching == (3, 2, 1, 1)
    assert growth_for("block").branching == (1,) * 6 and growth_for("block").siblings == "none"
    assert isinstance(growth_for(LenientAcceptance(0.5)), DySpecThreshold)
    with pytest.raises(ValueError, match="acceptance must be one of"):
        growth_for("exacr")
