"""The notation of the command line: what it accepts, and that all it refuses is refused in a sentence."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training import images

from batchkern.errors import UserError
from batchkern.strategies import (
    SRIP,
    STRATEGIES,
    BatchAugmentation,
    CutMix,
    Cutout,
    HardBatches,
    Mixup,
    PassiveInjection,
    RandomSelection,
    Stepwise,
    StochasticAugmentation,
    Strategy,
    Trimming,
    parse,
)

PASSIVE = images(20)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  ", []),
        ("baseline", []),
        ("trimming", [Trimming()]),
        ("trimming()", [Trimming()]),
        (" trimming ( end = 0.3 , start=.9 ) ", [Trimming(0.9, 0.3)]),
        ("trimming(backward=compact)", [Trimming(backward="compact")]),
        ("trimming(backward='compact')", [Trimming(backward="compact")]),
        ("trimming(end=1)", [Trimming(end=1)]),
        ("hard-batches(delta=0.5, order=index)", [HardBatches(0.5, "index")]),
        ("stepwise", [Stepwise()]),
        ("stepwise(fractions=(0.5,1.0),batch_multiples=[2,1])", [Stepwise((0.5, 1.0), (2, 1))]),
        ("stepwise(reset_optimizer=True)", [Stepwise(reset_optimizer=True)]),
        ("augmentation(omega=0.5,gaussian=3)", [StochasticAugmentation(0.5, 3)]),
        ("augmentation(layers=('conv1', 'fc'))", [StochasticAugmentation(layers=("conv1", "fc"))]),
        ("augmentation(layers=fc)", [StochasticAugmentation(layers=("fc",))]),
        ("random(select=batches)", [RandomSelection("batches")]),
        ("passive(passive=digits,every=20)", [PassiveInjection("digits", 20)]),
        ("passive(passive='a+b(c)/d')", [PassiveInjection("a+b(c)/d")]),
        ("trimming(\n  end=0.3\n)\n+ augmentation", [Trimming(end=0.3), StochasticAugmentation()]),
        ("trimming(above=99999999999999999999)", [Trimming(above=1e20)]),
        ("trimming(backward='mask\\u0065d')", [Trimming()]),
        ("trimming+stepwise+augmentation", [Trimming(), Stepwise(), StochasticAugmentation()]),
        ("cutout+batch-augmentation(copies=2)", [Cutout(), BatchAugmentation(2)]),
        ("cutout(size=8)+mixup(alpha=1)", [Cutout(8), Mixup(1)]),
        ("cutmix(probability=0.5)+srip(coefficient=1e-3)", [CutMix(probability=0.5), SRIP(1e-3)]),
    ],
)
def test_accepted(text, expected):
    assert [s.describe() for s in parse(text)] == [s.describe() for s in expected]


def test_the_passive_set_is_filled_in_where_none_is_named():
    assert parse("passive(every=3)", passive=PASSIVE)[0].passive is PASSIVE
    assert parse("passive(passive=digits)", passive=PASSIVE)[0].passive == "digits"
    assert parse("trimming", passive=PASSIVE)[0].describe() == Trimming().describe()


def test_all_strategies_have_a_name():
    passive = parse("+".join(["trimming", "passive", "hard-batches", "augmentation"]), passive=PASSIVE)
    assert [type(s) for s in passive] == [Trimming, PassiveInjection, HardBatches, StochasticAugmentation]
    papers = {"trimming", "hard-batches", "stepwise", "augmentation", "passive", "random"}
    selecting = {"rho", "importance", "selective-backprop", "infobatch", "small-loss"}
    assert set(STRATEGIES) == papers | selecting | {"cutout", "mixup", "cutmix", "batch-augmentation", "srip"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("triming", r"unknown strategy 'triming'.*did you mean trimming\?"),
        ("Trimming", "unknown strategy 'Trimming'"),
        ("xyz", "unknown strategy 'xyz'; there are trimming, hard-batches"),
        ("baseline+trimming", "unknown strategy 'baseline'"),
        ("trimming(stop=0.3)", "trimming has no option 'stop'; it has start, end, backward, schedule"),
        ("trimming(compact_below=0.3)", "trimming has no option 'compact_below'"),
        ("trimming(end=2)", "end must be in"),
        ("trimming(end=0)", "end must be in"),
        ("trimming(end=high)", "end"),
        ("trimming(end='0.3')", "end"),
        ("trimming(end=None)", "end"),
        ("trimming(end=True)", "end"),
        ("trimming(end=nan)", "end"),
        pytest.param(f"trimming(end=1{'0' * 400})", "a number that is too large", id="larger than any float"),
        pytest.param(f"augmentation(gaussian=0x{'f' * 9000})", "not of the form", id="more digits than can be shown"),
        pytest.param(f"passive(passive=(0x{'f' * 9000},))", "not of the form", id="such a number in a tuple"),
        pytest.param(f"trimming(end={'-' * 3500}1)", "not of the form", id="nested deeply"),
        pytest.param(f"trimming(end={'-' * 9000}1)", "not of the form", id="nested more deeply"),
        ("trimming(backward=both)", "backward must be"),
        ("trimming(backward=3)", "backward"),
        ("trimming(schedule=cosine)", "schedule"),
        ("trimming(0.3)", "not of the form"),
        ("trimming(end)", "not of the form"),
        ("trimming(end=0.3", "not of the form"),
        ("trimming end=0.3)", "not of the form"),
        ("trimming(end=0.3))", "not of the form"),
        ("trimming(start=0.9)(end=0.3)", "not of the form"),
        ("trimming(start=0.9).x(end=0.3)", "not of the form"),
        ("trimming(end=0.3,end=0.4)", "not of the form"),
        ("trimming(**{'end': 0.3})", "not of the form"),
        ("trimming(*[1])", "not of the form"),
        ("trimming(end=__import__('os'))", "not of the form"),
        ("trimming(end=f.x)", "not of the form"),
        ("trimming(end={[]: 1})", "not of the form"),
        ("trimming(end=0.3);x", "not of the form"),
        ("+trimming", "not of the form"),
        ("trimming+", "not of the form"),
        ("trimming++augmentation", "not of the form"),
        ("trimming stepwise", "not of the form"),
        ("trimming(end='\0')", "end|not of the form"),
        ("passive", "strategy passive needs the option passive"),
        ("passive(every=20)", "strategy passive needs the option passive"),
        ("passive(passive=3)", "passive"),
        ("passive(passive=digits,every=0)", "every"),
        ("passive(passive=digits,every=often)", "every"),
        ("passive(passive=digits,every=2.5)", "every"),
        ("passive(passive=digits,freeze_bn=maybe)", "freeze_bn"),
        ("augmentation(vote=false)", "vote"),
        ("augmentation(vote=0)", "vote"),
        ("augmentation(two_step=no)", "two_step"),
        ("augmentation(gaussian=1.5)", "gaussian"),
        ("augmentation(omega=steep)", "omega"),
        ("augmentation(layers=3)", "layers"),
        ("augmentation(layers=(3,))", "layers"),
        ("stepwise(fractions=0.5)", "fractions"),
        ("stepwise(fractions=(0.5,high))", "not of the form"),
        ("stepwise(fractions=('a','b'),batch_multiples=(1,1))", "fractions"),
        ("stepwise(reset_optimizer=yes)", "reset_optimizer"),
        ("hard-batches(delta=0.2,ledger=3)", "hard-batches has no option 'ledger'"),
        ("random(select=columns)", "select"),
        ("hard-batches(delta=nan)", "hard-batches: delta must be a number, got 'nan'"),
        ("hard-batches(delta=None)", "delta must be a number, got None"),
        ("hard-batches(delta=(0.5,))", r"delta must be a number, got \(0.5,\)"),
        ("augmentation(eta=1j)", "eta must be a number, got 1j"),
        (f"augmentation(eta=1{'0' * 400})", "has a number that is too large"),
        (f"augmentation(gaussian={2**63})", "gaussian"),
        ("stepwise(fractions=1e999)", r"fractions must be a list, such as \(a, b\), got inf"),
        ("stepwise(batch_multiples=ab)", "batch_multiples must be a list, .*, got 'ab'"),
        ("augmentation(layers={'a': 1})", "layers must be a list"),
        ("trimming(end=1e999)", r"end must be in \(0, 1\], got inf"),
        ("trimming(end=--1)", "not of the form"),
        ("trimming(end=0x)", "not of the form"),
        ("trimming(end=0.3) if 1 else f(end=1)", "not of the form"),
        ("trimming(end=1) if 1 else (2)", "not of the form"),
        ("tri\0mming", "not of the form"),
        ("trimming(\N{SLIGHTLY SMILING FACE}=1)", "not of the form"),
        ("\udcff", "not of the form"),
        ("cutout(size=0)", "size must be a whole number of at least 1, got 0"),
        ("cutout(size=half)", "size must be a whole number"),
        ("mixup(alpha=0)", "alpha must be above 0, got 0"),
        ("batch-augmentation(copies=1)", "copies must be a whole number of at least 2, got 1"),
        ("batch-augmentation(copies=None)", "copies must be a whole number"),
        ("srip(coefficient=-1)", "coefficient must be a number of at least 0, got -1"),
        ("trimming+trimming", "trimming and trimming both decide the loss"),
        ("hard-batches+stepwise", "hard-batches and stepwise both decide the batch plan"),
    ],
)
def test_refused(text, named):
    with pytest.raises(UserError, match=named):
        parse(text)


@pytest.mark.parametrize(
    "value",
    [
        "(" * 100000,
        "[" * 5000 + "]" * 5000,
        "-" * 100000 + "1",
        "-" * 3000 + "1",
        "not " * 2000 + "1",
        "1+" * 4000 + "1",
        "a." * 4000 + "b",
        "f(" * 2000 + ")" * 2000,
        "9" * 5000,
        "{1:" * 2000 + "}" * 2000,
    ],
    ids=lambda value: value[:4],
)
def test_deep_and_long_texts_are_refused_in_a_short_sentence(value):
    for text in (f"trimming(end={value})", value, f"trimming+{value}"):
        with pytest.raises(UserError) as refused:
            parse(text)
        assert len(str(refused.value)) < 500


def test_odd_spellings_warn_of_nothing(recwarn):
    with pytest.raises(UserError):
        parse(r"trimming(backward='\q', end=1if 1else 2)")
    assert not recwarn.list


WORDS = [
    "trimming",
    "augmentation",
    "passive",
    "stepwise",
    "hard-batches",
    "end",
    "omega",
    "layers",
    "0.3",
    "-1",
    "None",
    "True",
    "lambda",
    "end=0.2",
    "f",
]
words = st.sampled_from([*WORDS, *"()+=,[]{}'\"\\:*#. \n"])


@given(st.lists(words, max_size=12).map("".join) | st.text(max_size=30))
def test_whatever_is_written_the_answer_is_strategies_or_a_sentence(text):
    try:
        strategies = parse(text)
    except UserError:
        return
    assert all(isinstance(s, Strategy) for s in strategies)


def test_options_survive_the_way_through_text():
    strategy = StochasticAugmentation(omega=math.pi / 5, eta=0.3, two_step=True, per="epoch", layers=("a", "b.c"))
    options = ",".join(f"{key}={value!r}" for key, value in strategy.describe().items() if key != "name")
    assert parse(f"augmentation({options})")[0].describe() == strategy.describe()


def test_a_strategy_is_no_loss_function():
    with pytest.raises(
        TypeError, match=r"Trimming is not a function: .* for your own training loop, its parts are in batchkern\.parts"
    ):
        STRATEGIES["trimming"]()("logits", "target")
