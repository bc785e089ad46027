"""The counter of exits: exact false alarm rates, simulated ones, detection, and use without torch."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_selfkd import ExitPolicy, calibrate
from hf_selfkd.deploy import ExitCounter, exit_counter
from hf_selfkd.deploy.exit_counter import log_e_value, share_interval
from tests.helpers.calibration import COSTS, make_logits
from tests.helpers.layering import PACKAGE, imports

RATES = [0.4, 0.2, 0.3, 0.1]


def binomial(total, chance):
    counts = np.arange(total + 1)
    choices = np.array([math.comb(total, count) for count in counts], dtype=float)
    return choices * chance**counts * (1 - chance) ** (total - counts)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_intervals_miss_the_chance_as_rarely_as_promised(alpha):
    intervals = [share_interval(count, 60, alpha) for count in range(61)]
    for chance in np.linspace(0.01, 0.99, 99):
        missed = np.array([not low <= chance <= high for low, high in intervals])
        assert (binomial(60, chance) * missed).sum() <= alpha
    low, high = share_interval(30, 60, alpha)
    margin = (math.log(2 / alpha) / (2 * 60)) ** 0.5  # Hoeffding's, which is wider
    assert 0.5 * margin < 0.5 - low < margin and 0.5 * margin < high - 0.5 < margin


def test_the_mean_of_an_e_value_is_at_most_one_within_the_interval_and_large_outside():
    e_values = np.exp([log_e_value(count, 50, (0.3, 0.4)) for count in range(51)])
    for chance in np.linspace(0.3, 0.4, 11):
        assert (binomial(50, chance) * e_values).sum() <= 1
    assert (binomial(50, 0.1) * e_values).sum() > 20 and (binomial(50, 0.7) * e_values).sum() > 20


def test_e_values_are_a_martingale_before_the_worst_chance_is_taken():
    """The mixture is a probability of sequences: one more image splits it among the two that it may lead to."""
    for count, total in [(0, 0), (3, 7), (40, 50)]:
        chance = (0.5, 0.5)  # fixed, so that only the mixture differs
        stay, exit = (log_e_value(count + more, total + 1, chance) for more in (0, 1))
        assert (math.exp(stay) + math.exp(exit)) / 2 == pytest.approx(math.exp(log_e_value(count, total, chance)))


def alarms(calibration, stream, alpha, trials, looks=25, images=40):
    """Return the share of counters that ever raise an alarm, of those that look after every few images."""
    generator, alarmed = np.random.default_rng(0), 0
    for _ in range(trials):
        counter = ExitCounter(generator.multinomial(400, calibration).tolist(), alpha=alpha)
        for counts in generator.multinomial(images, stream, size=looks).tolist():
            counter.add(counts)
            if counter.has_drifted:
                alarmed += 1
                break
    return alarmed / trials


def test_a_simulated_counter_raises_few_false_alarms_and_notices_drift():
    assert alarms(RATES, RATES, alpha=0.2, trials=150) <= 0.2
    assert alarms(RATES, [0.2, 0.2, 0.3, 0.3], alpha=0.01, trials=30) > 0.9  # harder images
    assert alarms(RATES, [0.4, 0.45, 0.1, 0.05], alpha=0.01, trials=30) > 0.9  # as many at the first exit
    assert alarms(RATES, [0.65, 0.2, 0.1, 0.05], alpha=0.01, trials=30) > 0.9  # easier images


@pytest.mark.slow
def test_the_thresholds_that_calibrate_chose_on_the_counted_images_raise_few_false_alarms():
    """Choosing thresholds on the images that are counted makes their counts a little too good to be true."""
    exit_logits, labels = make_logits(20_000)
    alarmed = 0
    for trial in range(60):
        rows = torch.randperm(20_000, generator=torch.Generator().manual_seed(trial))
        policy = calibrate(exit_logits[:, rows[:300]], labels[rows[:300]], COSTS, target_cost=0.6)
        counter = ExitCounter(policy.calibration["exit_counts"], alpha=0.1)
        for exits in policy.decide(exit_logits[:, rows[300:8300]])[0].split(200):
            counter.update(exits)
            if counter.has_drifted:
                alarmed += 1
                break
    assert alarmed / 60 <= 0.1


def test_policies_count_their_own_images():
    exit_logits, labels = make_logits(1500)
    policy = calibrate(exit_logits[:, :700], labels[:700], COSTS, target_cost=0.7).at(0.5)
    restored = json.loads(json.dumps(policy.to_dict()))
    counter = ExitCounter.for_policy(restored)
    counter.update(policy.decide(exit_logits[:, 700:])[0])
    assert sum(counter.counts) == 800 and not counter.has_drifted
    for row, (low, high) in zip(counter.rows(), counter.intervals, strict=True):
        assert low < row["observed"] < high and row["e-value"] < 1 and not row["drifted"]
    counter.update(policy.decide(exit_logits[:, 700:] / 4)[0])  # less confident predictions
    assert counter.has_drifted and counter.rows()[0]["drifted"]
    assert counter.rows()[0]["observed"] < counter.intervals[0][0]
    json.dumps(counter.rows(), allow_nan=False)


def test_counts_add_up_from_tensors_numbers_and_other_processes():
    counter = ExitCounter([5, 3, 2])
    counter.update(torch.tensor([0, 2, 2]))
    counter.update(np.array([1]))
    counter.update(torch.tensor(1))
    counter.update([])
    counter.add([10, 0, 1])
    assert counter.counts == [11, 2, 3]
    counter.add([10**6, 0, 0])
    assert counter.has_drifted and all(map(math.isfinite, counter.e_values))


def test_no_image_is_no_evidence():
    counter = ExitCounter([5, 0])
    assert counter.e_values == [pytest.approx(1)] and not counter.has_drifted
    assert counter.rows()[0]["observed"] == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ExitCounter([10]), "the numbers of calibration images that exited at each of two exits or more"),
        (lambda: ExitCounter([0, 0]), "but got .0, 0."),
        (lambda: ExitCounter([0.5, 0.5]), "but got .0.5, 0.5."),
        (lambda: ExitCounter([3, 4], alpha=1), "ExitCounter needs 0 < alpha < 1, but got alpha=1"),
        (lambda: ExitCounter([3, 4]).update([0, 2]), "The policy has 2 exits, from 0, but got 2"),
        (lambda: ExitCounter([3, 4]).add([1]), "counts must be 2 integers of at least 0, one per exit, but got .1."),
        (lambda: ExitCounter([3, 4]).add([1, -1]), "but got .1, -1."),
        (lambda: ExitCounter.for_policy(ExitPolicy(thresholds=[0.5]).to_dict()), "Calibrate it again"),
        (lambda: ExitCounter.for_policy({"calibration": {"samples": 5}}), "Calibrate it again"),
    ],
)
def test_bad_counts(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_it_needs_the_standard_library_only():
    assert imports(PACKAGE / "deploy" / "exit_counter.py") == (set(), set())
    code = "import runpy; print(runpy.run_path('exit_counter.py')['ExitCounter']([7, 3]).counts)"
    folder = PACKAGE / "deploy"
    assert exit_counter.__file__ == str(folder / "exit_counter.py")
    process = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=folder, capture_output=True, text=True)
    assert process.stdout.strip() == "[0, 0]", process.stderr
