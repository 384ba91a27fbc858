"""The resolver that a run file names, one's own, and weights as factors that leave the step's size alone."""

import doctest

import numpy as np
import pytest
from torchjd.aggregation import UPGrad as TorchUPGrad
from torchjd.aggregation import UPGradWeighting

from fastsft.mixing import conflict
from fastsft.mixing.conflict import NAMES, from_torchjd, make_resolver, weigh
from fastsft.mixing.resolvers import MGDA, AlignedMTL, Gem, PCGrad, Random, Uniform, UPGrad
from fastsft.tasks import MixError, Resolver
from tests.mixing._grams import KINDS, gram_of

ABILITIES = ["maths", "code", "general"]


def test_every_name_makes_its_resolver():
    made = {name: make_resolver(name, abilities=ABILITIES, seed=7) for name in NAMES}
    assert made == {
        "none": None,
        "upgrad": UPGrad(),
        "pcgrad": PCGrad(),
        "gem": Gem(),
        "aligned_mtl": AlignedMTL(),
        "mgda": MGDA(),
        "uniform": Uniform(),
        "random": Random(seed=7),
    }
    assert all(isinstance(resolver, Resolver) for name, resolver in made.items() if name != "none")


def test_protected_abilities_are_found_by_their_place_in_the_run():
    named = make_resolver("gem", abilities=ABILITIES, protected=["general", "maths"])
    assert named.bind(ABILITIES) == Gem(protected=(2, 0))
    assert named.bind(["maths", "general"]) == Gem(protected=(1, 0))
    assert Gem().bind(ABILITIES) == Gem()
    with pytest.raises(MixError, match="'general', and no source is of that ability"):
        named.bind(["maths", "code"])
    with pytest.raises(MixError, match="`bind` them"):
        named(np.eye(3))


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("upgard", {}, "no resolver 'upgard': did you mean 'upgrad'?"),
        ("aligned", {}, "no resolver 'aligned': did you mean 'aligned_mtl'?"),
        ("xyz", {}, "no resolver 'xyz': there are none, upgrad, pcgrad"),
        ("gem", {"protected": ["history"]}, "`protected` names 'history', and the run's abilities are maths, code"),
        ("gem", {"protected": ["code", "code"]}, "`protected` must name each ability once: got code, code"),
        ("upgrad", {"protected": ["code"]}, "'upgrad' protects none in particular: take `resolver: gem`"),
        ("none", {"protected": ["code"]}, "'none' protects none in particular"),
        ("upgrad", {"abilities": []}, "`abilities` is empty"),
    ],
)
def test_names_that_cannot_hold_are_refused(name, settings, sentence):
    with pytest.raises(MixError, match=sentence):
        make_resolver(name, **{"abilities": ABILITIES, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_a_torchjd_weighting_serves_as_a_resolver(kind):
    gram = gram_of(kind, 5)
    resolver = from_torchjd(UPGradWeighting())
    found = weigh(resolver, gram.tolist())
    assert found.dtype == np.float64
    # TorchJD's solver and ours: rounding of a few dozen operations on numbers near one
    np.testing.assert_allclose(found, UPGrad()(gram), rtol=0, atol=1e-8)
    # a matrix of ours is not handed out to be written on
    spoil = from_torchjd(lambda gram: gram.zero_().diagonal() + 1)
    spoil(gram)
    assert gram.any()


def test_a_torchjd_aggregator_is_refused_with_the_weighting_to_take():
    # called with a Gram matrix it would take its rows for gradients, and answer
    with pytest.raises(MixError, match=r"UPGrad is a TorchJD aggregator.*`aggregator.gramian_weighting`"):
        from_torchjd(TorchUPGrad())
    from_torchjd(TorchUPGrad().gramian_weighting)
    with pytest.raises(MixError, match="must be callable on a Gram matrix: got 3"):
        from_torchjd(3)


def test_the_example_in_the_docstring_is_true():
    assert doctest.testmod(conflict) == (0, 3)
