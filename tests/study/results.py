"""The results of the miniature, and statistics over its seeds."""

import json
import statistics
from pathlib import Path

from data.runs.paper import DEMO_SETS
from data.runs.report import last_reliable_step
from tests.study.miniature import RESULTS, SEEDS, STUDENTS, TEACHER, Experiment

# Table 2, the variants and the differences of the released code are on the small student, the
# README's table on the large one.
SMALL, LARGE = STUDENTS
NOT_RUN, NOT_APPLICABLE = "not run", "–"
NAMES = {"init": "init", "sft": "SFT", "kd": "KD", "seqkd": "SeqKD"}
NAMES |= {"minillm": "MiniLLM", "gkd": "GKD", "promptkd": "PromptKD"}
METHODS = tuple(NAMES)  # of Table 1, in its order; GROUPS has the order of computation
COLUMNS = (*DEMO_SETS, "average")

# What `measure.prompt_effect` gives, {name in the results: label}: the responses on which means
# over tokens are taken, and the means. p is the teacher, p_P the prompted one, q the student.
ON_REFERENCES, ON_STUDENT = "references", "student's responses"
RESPONSES = {ON_REFERENCES: "first references", ON_STUDENT: "student's responses"}
KLS = {"kl p q": "KL(p ‖ q)", "kl p_P q": "KL(p_P ‖ q)", "kl p_P p": "KL(p_P ‖ p)"}
REVERSE_KLS = {"kl q p": "KL(q ‖ p)", "kl q p_P": "KL(q ‖ p_P)"}
LOSSES = {"loss p": "loss of p", "loss p_P": "loss of p_P", "loss q": "loss of q"}

# The 0.975 quantile of Student's t with n - 1 degrees of freedom, by n: NIST/SEMATECH e-Handbook of
# Statistical Methods, section 1.3.6.7.2.
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}
T_QUANTILE[10] = 2.262


# ---- reading -------------------------------------------------------------------------------------


def load_results(directory=RESULTS):
    """All results, {name of a run: its JSON}."""
    paths = sorted(Path(directory).glob("**/*.json"))
    names = [path.relative_to(directory).as_posix().removesuffix(".json") for path in paths]
    return {name: json.loads(path.read_text()) for name, path in zip(names, paths)}


def teacher_result(results):
    return results.get(Experiment(TEACHER, "teacher", 10).name)


def by_seed(results, student, variant):
    """The results of a variant, {seed: JSON}, of the seeds that have one."""
    names = {seed: Experiment(student, variant, seed).name for seed in SEEDS}
    return {seed: results[name] for seed, name in names.items() if name in results}


def measured(results, student, variant, metric):
    """A number measured on the runs of a variant, {seed: metric(JSON)}."""
    return {seed: metric(result) for seed, result in by_seed(results, student, variant).items()}


def table1_results(results, student):
    """All results of Table 1 for a student, in a list."""
    return [r for method in METHODS for r in by_seed(results, student, method).values()]


# ---- what a result says --------------------------------------------------------------------------


def rouge_l(column, way="sampled"):
    """The function that takes a result to its ROUGE-L on a set, or to the average of all sets: the
    mean over the sampling seeds."""

    def metric(result):
        scores = result["rouge_l"][way]
        sets = DEMO_SETS if column == "average" else [column]
        return statistics.fmean(statistics.fmean(scores[name]) for name in sets)

    return metric


def effect(responses, name):
    """The function that takes a result to a mean over tokens that `measure.prompt_effect` gives, at
    the best checkpoint. responses: of RESPONSES. name: of KLS, REVERSE_KLS or LOSSES."""
    return lambda result: result["effect"][responses][name]


def effect_along(responses, i, name):
    """As `effect`, at the i-th point along training. The first is the init with the untuned prompt,
    the last is the last step."""
    return lambda result: result["along"][i]["effect"][responses][name]


def effect_on(other, responses, name):
    """As `effect`, with another student of the same seed, "init" or "gkd"."""
    return lambda result: result["effect_on"][other][responses][name]


def minutes(result):
    return 60 * result["hours"]


def common_step(curves):
    """The last generation step at which all curves of exposure bias are reliable; 0 if none is
    given."""
    return min(map(last_reliable_step, curves), default=0)


def exposure_at(l, without_first=False):
    """The function that takes a result to ExAccErr at generation step l, in %.

    without_first: the sums over steps then begin at the second token, as in the released code.
    """
    if without_first:
        return lambda result: result["exposure"]["ex_acc_err_without_first"][l - 2]
    return lambda result: result["exposure"]["ex_acc_err"][l - 1]


def released_exposure_at(l, name):
    """The function that takes a result to ExAccErr at generation step l as the released code
    measures it, in %. name: of `measure.released_exposure`."""
    first_step = 2 if name == "all three" else 1
    return lambda result: result["exposure_released"][name][l - first_step]


def error_per_step(l):
    """The function that takes a result to R(l) / l: the error per step on the student's own text,
    in nats."""
    return lambda result: result["exposure"]["R"][l - 1] / l


def epsilon_at(l):
    """The function that takes a result to ε(l): the error per step on the teacher's text, in
    nats."""
    return lambda result: result["exposure"]["epsilon"][l - 1]


# ---- statistics over seeds -----------------------------------------------------------------------


def differences(a, b):
    """a - b of the seeds that both have, {seed: difference}."""
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def mean_interval(values):
    """The mean of values and half the width of its 95 % interval by Student's t, which is None for
    a single value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, None
    return mean, T_QUANTILE[n] * statistics.stdev(values) / n**0.5


def format_seeds(values):
    """What a cell says of the number of its seeds: nothing if none is missing."""
    return "" if len(values) == len(SEEDS) else f" (n = {len(values)})"


def format_mean(values, digits=1):
    """A cell: mean ± standard deviation over the seeds of {seed: value}. What no seed changes, as a
    number of the bare teacher, has no deviation."""
    if not values:
        return NOT_RUN
    cell = f"{statistics.fmean(values.values()):.{digits}f}"
    if len(set(values.values())) > 1:
        cell += f" ± {statistics.stdev(values.values()):.{digits}f}"
    return cell + format_seeds(values)


def format_median(values, digits=1):
    if not values:
        return NOT_RUN
    return f"{statistics.median(values.values()):.{digits}f}" + format_seeds(values)


def format_interval(values, digits=1):
    """A cell: the mean over seeds and its 95 % interval, bold if that does not include 0."""
    if not values:
        return NOT_RUN
    mean, half = mean_interval(list(values.values()))
    cell = f"{mean:+.{digits}f}"
    if half is not None:
        cell += f" ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"
        cell = f"**{cell}**" if abs(mean) > half else cell
    return cell + format_seeds(values)
