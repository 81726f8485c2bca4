"""The conformance suite: everything that a user of a variant will do with it, tried on tiny models in a second or two.

    import minilora.testing

    minilora.testing.check_variant(MyConfig(r=4))

or one test for each check:

    @pytest.mark.parametrize("check", minilora.testing.CHECKS, ids=lambda check: check.__name__)
    def test_my_variant(check):
        check(MyConfig(r=4))

Read trial.py first (what a check is tried on), then arithmetic.py and life.py, the checks.
Needs nothing but what minilora needs. The guide is docs/write_your_own_variant.md.
"""

from collections.abc import Mapping
from types import MappingProxyType

from minilora.adapters import AdapterConfig, add_adapter
from minilora.progress import with_progress
from minilora.testing import arithmetic, life
from minilora.testing.trial import CHECKS, Add, Check, example_input

__all__ = ["CHECKS", "Add", "Check", "arithmetic", "check_variant", "example_input", "life"]


def check_variant(
    config: AdapterConfig, *, add: Add = add_adapter, exceptions: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Try every check on the variant that is registered for this configuration.

    The models have two layers named "first" (16 features to 12) and "second" (12 to 8), for options that take names.

    Args:
        config: the variant's configuration, with small ranks; `target_modules` is set to both layers.
        add: puts an adapter on a model, for a variant that needs more than `add_adapter(model, config, name)`, such as
            data; `example_input(model)` is what the model takes.
        exceptions: {name of a check: why the variant fails it by design}. It must then fail, so that no exception
            outlives its reason. A method that takes no gradient by design needs none: `held_constant` in the class
            declares it.

    Raises:
        AssertionError: at the first check that fails: what was expected, what was found, and where to look.
    """
    for check in with_progress(CHECKS, len(CHECKS), f"Trying {type(config).__name__}", "checks"):
        check(config, add=add, exceptions=exceptions)
