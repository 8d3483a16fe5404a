"""Comparisons of guides: what is measured is right, what does not apply says why, nothing breaks."""

import copy
import csv
import io
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from rich.console import Console
from torch import nn

from pyrozoo.guides import Amortized, Classifier, Sequential
from pyrozoo.guides.auto import Auto
from pyrozoo.inference import EnumELBO
from pyrozoo.inference.bounds.importance import IWELBO
from pyrozoo.inference.comparison import tables
from pyrozoo.inference.comparison.compare import compare
from pyrozoo.inference.comparison.measuring import Effort, measure
from pyrozoo.inference.comparison.outcome import Cell, Comparison

ROWS = 12
TINY = Effort(40, 20, 0, sbc_datasets=0, reference_rows=0)


class Factors(nn.Module):
    """``z ~ Normal(0, I)``, ``x | z ~ Normal(W z + b, s)``; W to be learnt."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.4], [0.6, 1.0], [-0.5, 0.7]]))
        self.scale = torch.tensor([0.5, 0.7, 0.6])

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, self.scale).to_event(1))

    def posterior(self, x):
        w = self.weight.detach() / self.scale.unsqueeze(-1)
        precision = torch.eye(2) + w.T @ w
        mean = torch.linalg.solve(precision, w.T @ (x / self.scale).T).T
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def evidence(self, x):
        w = self.weight.detach()
        cov = w @ w.T + torch.diag(self.scale**2)
        return dist.MultivariateNormal(torch.zeros(3), cov).log_prob(x)

    def draws(self, x):
        def make(count, seed):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return {"z": self.posterior(x).sample((count,))}

        return make


class Scaled(nn.Module):
    """The exact posterior with its scales multiplied."""

    def __init__(self, program, factor=1.0):
        super().__init__()
        self.program, self.factor = program, factor

    def forward(self, batch):
        exact = self.program.posterior(batch["x"])
        with pyro.plate("data", len(batch)):
            fn = dist.MultivariateNormal(exact.mean, scale_tril=self.factor * exact.scale_tril)
            pyro.sample("z", fn)


class Labelled(nn.Module):
    """``y ~ Cat``, ``z ~ Normal(m_y, 1)``, ``x ~ Normal((z, -z), 1)``, read with an input u."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-2.0, 0.0, 2.0]))

    def forward(self, batch):
        u = batch["u"] if "u" in batch else torch.zeros(len(batch))
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
            z = pyro.sample("z", dist.Normal(self.loc[y] + u, 1.0))
            pyro.sample("x", dist.Normal(torch.stack([z, -z], -1), 1.0).to_event(1))


class Chain(nn.Module):
    """A hidden Markov model with two states, without a data plate."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def forward(self, batch):
        move, state = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), 0
        for t in pyro.markov(range(len(batch))):
            state = pyro.sample(
                f"y_{t}", dist.Categorical(move[state]), infer={"enumerate": "parallel"}
            )
            value = batch["x"][t] if "x" in batch else None
            pyro.sample(f"x_{t}", dist.Normal(self.loc[state], 1.0), obs=value)


class Shared(nn.Module):
    """``mu ~ Normal(0, 2)``, a finite choice of the scale, ``x ~ Normal(mu, s)``."""

    def __init__(self, finite=False):
        super().__init__()
        self.finite = finite

    def forward(self, batch):
        scale = torch.tensor(1.0)
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        if self.finite:
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            scale = torch.tensor([0.5, 2.0])[k]
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(mu, scale))


class Nothing(nn.Module):
    def forward(self, batch):
        pass


class Misnamed(nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("zz", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def factors(rows=ROWS):
    torch.manual_seed(0)
    program = Factors()
    x = torch.randn(rows, 2) @ program.weight.detach().T + program.scale * torch.randn(rows, 3)
    return program, {"x": x}


def amortized(family="mean_field", hidden=(8,), **options):
    return lambda program: Amortized(program, ["x"], hidden, family=family, **options)


def fitted(*args, **options):
    options = {"epochs": 2, "effort": TINY, **options}
    return compare(*args, **options)


def figures(found):
    return {c.name: c.measures.figures for c in found.cells}


# ---- what is left as it was ----------------------------------------------------------------------


def test_nothing_given_is_changed_and_a_seed_repeats_itself():
    program, data = factors()
    guide = Amortized(program, ["x"], (8,)).train()
    program.train()
    before = copy.deepcopy((program.state_dict(), guide.state_dict()))
    state, x = torch.get_rng_state(), data["x"].clone()
    guides = {"given": guide, "made": amortized()}
    first, second = (fitted(program, guides, data, seeds=[3], effort=TINY) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for net, old in zip((program, guide), before, strict=True):
        assert net.training
        assert all(p.requires_grad and p.grad is None for p in net.parameters())
        assert all(torch.equal(v, old[n]) for n, v in net.state_dict().items())
    assert torch.equal(data["x"], x)
    timed = ("ms_per_step", "seconds_to_target")
    for name, values in figures(first).items():
        other = figures(second)[name]
        assert {k: v for k, v in values.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }
    learnt = first.cells[0].result.program
    assert not torch.equal(learnt.weight, program.weight)


def test_learn_guide_leaves_the_program_and_a_guide_keeps_its_program():
    program, data = factors()
    found = fitted(program, {"own": Scaled(program), "net": amortized()}, data, learn="guide")
    for cell in found.cells:
        assert torch.equal(cell.result.program.weight, program.weight)
    own = found.cells[0].result
    assert own.guide.program is own.program
    assert own.guide.program is not program
    assert found.records()[0]["parameters"] == 0
    both = fitted(program, {"own": Scaled(program)}, data, epochs=1)
    assert both.cells[0].result.guide.program is both.cells[0].result.program


def test_objectives_change_training_alone():
    program, data = factors()
    losses = {"ELBO": EnumELBO, "IWAE 3": IWELBO(3), "weighted": EnumELBO(weights={"x": 0.5})}
    guide = Scaled(program, 0.7)  # nothing of it is learnt
    found = fitted(program, {"g": guide}, data, objectives=losses, learn="guide")
    assert found.names == ["g", "g, IWAE 3", "g, weighted"]
    first, *others = figures(found).values()
    assert all(other == first for other in others)
    net = fitted(program, {"g": amortized()}, data, objectives=losses, epochs=3)
    bounds = [f["elbo"] for f in figures(net).values()]
    assert len(set(bounds)) == 3


def test_several_seeds_give_mean_and_sd():
    program, data = factors()
    found = fitted(program, {"a": amortized()}, data, seeds=2)
    record = found.records()[0]
    values = [c.measures.figures["elbo"] for c in found.cells]
    assert record["seeds"] == 2
    assert record["elbo"] == pytest.approx(sum(values) / 2)
    assert record["elbo_sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert f"{record['elbo']:.3f} ± {record['elbo_sd']:.3f}" == tables.cell(record, "elbo")
    high = fitted(program, {"a": amortized()}, data, seeds=2, target=1e3)
    assert "seconds_to_target" not in high.records()[0]
    assert any("2 of 2 fits did not reach the target" in note for note in high.notes())


# ---- what does not apply -------------------------------------------------------------------------


def test_guides_that_do_not_apply_are_rows_with_reasons(tmp_path):
    program, data = factors()

    def broken(program):
        raise KeyError("nothing here")

    guides = {
        "good": amortized(),
        "missing": Nothing(),
        "other site": Misnamed(),
        "broken": broken,
        "no module": lambda program: 3,
        "autoguide": lambda program: Auto(program, "AutoNormal", data),
    }
    test = {"x": data["x"][:5]}
    said = []
    found = fitted(program, guides, data, test=test, say=said.append)
    reasons = {c.name: c.reason for c in found.cells}
    assert reasons["good"] == ""
    assert "'z'" in reasons["missing"]
    assert "'zz'" in reasons["other site"]
    assert reasons["broken"] == "not fitted, KeyError: 'nothing here'"
    assert reasons["autoguide"].startswith("not measured, an autoguide has parameters for each of")
    assert len(said) == len(guides) == len(found.records())
    assert found.rows == 5
    notes = "\n".join(found.notes())
    assert "broken: not fitted, KeyError" in notes
    found.write(tmp_path / "c.html")
    assert "KeyError" in (tmp_path / "c.html").read_text("utf-8")
    with pytest.raises(ValueError, match="no guide is left to compare; missing: not fitted"):
        fitted(program, {"missing": Nothing()}, data)


def test_bad_input_is_named():
    program, data = factors()
    guides = {"a": amortized()}
    frozen = {"learn": "guide"}
    for error, text, options in [
        (ValueError, "learn is 'both' or 'guide', got 'all'", {"learn": "all"}),
        (ValueError, "reference is draws, a function or 'nuts', got 'hmc'",
         {"reference": "hmc", **frozen}),
        (ValueError, "a reference needs learn='guide'", {"reference": "nuts"}),
        (ValueError, r"log_evidence .* \(12,\), got \(5,\)", {"log_evidence": torch.zeros(5)}),
        (ValueError, r"draws of 'z' are expected as \(draws, 12 rows, ...\), got \(9, 4, 2\)",
         {"reference": {"z": torch.zeros(9, 4, 2)}, **frozen}),
        (ValueError, "reference: 'w' is not a site", {"reference": {"w": torch.zeros(9)}, **frozen}),
        (ValueError, "seeds are a positive number, or different whole", {"seeds": 0}),
        (ValueError, "seeds are a positive number, or different whole", {"seeds": [1, 1]}),
        (TypeError, "objectives: 'best' is nothing that could be used, got 'best'",
         {"objectives": {"best": "best"}}),
        (ValueError, "epochs is at least 1, got -1", {"epochs": -1}),
        (ValueError, "'y'", {"test": {"y": torch.zeros(3)}}),
    ]:  # fmt: skip
        with pytest.raises(error, match=text):
            fitted(program, guides, data, **options)
    with pytest.raises(ValueError, match="there is no guide to compare"):
        compare(program, {}, data)
    with pytest.raises(TypeError, match="guides are a dictionary of names, got list"):
        compare(program, [amortized()], data)
    with pytest.raises(ValueError, match="num_particles is at least 1, got 0"):
        Effort(num_particles=0)
    assert Effort(gap_rows=0).quick().gap_rows == 0


# ---- the measures --------------------------------------------------------------------------------


def test_gaps_of_a_mean_field_guide_have_a_closed_form():
    program, data = factors(20)
    exact = program.posterior(data["x"])
    precision = exact.precision_matrix[0]
    family = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    effort = Effort(200, 500, 20, 200, sbc_datasets=0, reference_rows=0)
    options = {"learn": "guide", "effort": effort, "batch_size": 10, "lr": 0.02, "epochs": 60}
    small = amortized(hidden=(1,))
    found = compare(
        program, {"small": small, "linear": amortized(hidden=())}, data,
        log_evidence=program.evidence(data["x"]), **options,
    )  # fmt: skip
    for values in figures(found).values():
        parts = values["approximation_gap"] + values["amortisation_gap"]
        assert parts == pytest.approx(values["gap"], abs=1e-9)
        assert values["approximation_gap"] == pytest.approx(family.item(), abs=0.02)
    small, linear = figures(found).values()
    assert small["amortisation_gap"] > 0.1 > linear["amortisation_gap"]


def test_evidence_is_shared_where_it_is_not_known():
    program, data = factors()
    wide, exact = Scaled(program, 2.0), Scaled(program)
    effort = Effort(200, 200, 4, 3, sbc_datasets=0, reference_rows=0)
    found = fitted(program, {"wide": wide, "exact": exact}, data, learn="guide", effort=effort)
    wide, exact = figures(found).values()
    assert exact["gap"] == pytest.approx(0, abs=1e-4)
    right = 2 * (0.5 * 4 - 0.5 - math.log(2.0))  # KL of Normal(0, 2) to Normal(0, 1), twice
    assert wide["gap"] == pytest.approx(right, abs=0.1)
    assert exact["khat_bad"] == 0


def test_draws_calibration_and_reference():
    program, data = factors()
    x = data["x"]
    effort = Effort(40, 20, 0, sbc_datasets=300, sbc_draws=49, reference_rows=1,
                    reference_draws=300)  # fmt: skip
    guides = {"exact": Scaled(program), "half": Scaled(program, 0.3)}
    found = fitted(program, guides, data, learn="guide", effort=effort, reference=program.draws(x))
    exact, half = figures(found).values()
    assert exact["c2st"] == pytest.approx(0.5, abs=0.08)
    assert half["c2st"] > 0.7
    assert abs(exact["mmd2"]) < 0.01 < half["mmd2"]
    assert exact["sbc_p"] > 1e-3 > half["sbc_p"]
    assert exact["coverage_90"] == pytest.approx(0.9, abs=0.05)
    assert half["coverage_90"] < 0.6


def test_reference_by_nuts_and_global_sites():
    torch.manual_seed(0)
    x = 1.0 + torch.randn(6)
    effort = Effort(400, 400, 6, 20, sbc_datasets=5, reference_rows=1, reference_draws=100)
    found = fitted(
        Shared(), {"normal": amortized(hidden=())}, {"x": x}, learn="guide", reference="nuts",
        objectives={"ELBO": EnumELBO(16)}, effort=effort, epochs=150, batch_size=6, lr=0.1,
    )  # fmt: skip
    values = found.records()[0]
    cov = torch.eye(6) + 4.0
    exact = dist.MultivariateNormal(torch.zeros(6), cov).log_prob(x).item() / 6
    assert values["iwae_400"] == pytest.approx(exact, abs=0.02)
    assert values["gap"] == pytest.approx(0, abs=0.02)
    assert values["approximation_gap"] == pytest.approx(0, abs=0.02)
    assert values["c2st"] < 0.65
    assert "sbc_p" not in values
    notes = "\n".join(found.notes())
    assert "Rows share latent sites: bounds and k-hat are those of all 6 rows" in notes
    assert "No SBC p for all guides: rows share latent sites: each simulated data set" in notes


def test_guides_that_propose_nothing():
    class Mixture(nn.Module):
        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                y = pyro.sample("y", dist.Categorical(torch.tensor([0.6, 0.4])))
                pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[y], 1.0))

    x = torch.linspace(-2, 2, 7)
    parts = torch.stack([dist.Normal(m, 1.0).log_prob(x) for m in (-1.0, 1.0)], -1)
    evidence = (parts + torch.tensor([0.6, 0.4]).log()).logsumexp(-1)
    found = fitted(
        Mixture(), {"nothing": Nothing()}, {"x": x}, log_evidence=evidence,
        effort=Effort(40, 20, 5, sbc_datasets=0, reference_rows=0),
    )  # fmt: skip
    values = found.records()[0]
    assert abs(values["gap"]) < 1e-6
    assert values["parameters"] == 0
    assert any("the guide proposes nothing" in note for note in found.notes())


def test_point_masses_have_no_bound():
    program, data = factors()
    found = fitted(program, {"delta": amortized("delta"), "mean field": amortized()}, data)
    delta, other = figures(found).values()
    assert "elbo" in other
    assert not {"elbo", "gap", "seconds_to_target", "khat_bad"} & delta.keys()
    assert any("point mass" in note for note in found.notes())


def test_inputs_missing_values_and_labels_in_part():
    torch.manual_seed(0)
    program, rows = Labelled(), 10
    seen = torch.arange(rows) % 2 == 0
    data = {
        "u": torch.linspace(-1, 1, rows),
        "y": (torch.arange(rows) % 3, seen),
        "x": (torch.randn(rows, 2), torch.rand(rows, 2) < 0.7),
    }
    example = {n: data[n] for n in ("u",)}
    guides = {
        "summed": lambda p: Amortized(p, ["x"], (8,), example=example),
        "classifier": lambda p: Sequential(
            Classifier(p, "y", ["x"], (8,)), Amortized(p, ["x", "y"], (8,), example=example)
        ),
    }
    effort = Effort(40, 20, 5, 5, sbc_datasets=20, sbc_draws=9, reference_rows=0)
    found = fitted(program, guides, data, inputs=["u"], effort=effort, batch_size=4)
    for cell in found.cells:
        assert not cell.reason
        assert {"elbo", "iwae_40", "khat_bad", "gap", "approximation_gap", "sbc_p"} <= set(
            cell.measures.figures
        ), cell.measures.reasons


@pytest.mark.parametrize("case", ["chain", "finite global"])
@pytest.mark.filterwarnings("ignore:falling back")
def test_programs_outside_the_row_wise_class(case):
    torch.manual_seed(0)
    x = torch.randn(4)
    program = Chain() if case == "chain" else Shared(finite=True)
    guide = Nothing() if case == "chain" else amortized(hidden=())
    effort = Effort(30, 20, 4, 5, sbc_datasets=5, reference_rows=0)
    found = fitted(program, {"g": guide}, {"x": x}, effort=effort, batch_size=4,
                   inputs=["x"] if case == "chain" else [])  # fmt: skip
    cell = found.cells[0]
    assert not cell.reason
    assert math.isfinite(cell.measures.figures["elbo"])
    assert "all 4 rows together" in " ".join(found.notes())


def test_autoguides_belong_to_their_rows():
    program, data = factors()
    guides = {kind: lambda p, kind=kind: Auto(p, kind, data)
              for kind in ("AutoNormal", "AutoMultivariateNormal")}  # fmt: skip
    effort = Effort(40, 20, 4, 5, sbc_datasets=5, reference_rows=1, reference_draws=20)
    found = fitted(program, guides, data, learn="guide", effort=effort,
                   reference=program.draws(data["x"]))  # fmt: skip
    normal, joint = found.cells
    assert {"elbo", "iwae_40", "gap", "approximation_gap", "c2st"} <= set(normal.measures.figures)
    assert {"elbo", "c2st"} <= set(joint.measures.figures)
    assert "khat_bad" in joint.measures.reasons or math.isfinite(joint.measures.figures["iwae_40"])
    assert "one density of all rows" in joint.measures.joint
    assert "simulated ones need a fit" in normal.measures.reasons["sbc_p"]


def test_measure_takes_programs_that_are_functions():
    def program(batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    x = torch.linspace(-1, 1, 5)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x)
    found = fitted(program, {"a": amortized()}, {"x": x}, log_evidence=evidence)
    assert found.title == "program"
    assert found.records()[0]["gap"] > -0.05
    measures = measure(program, found.cells[0].result.guide, {"x": x}, effort=TINY)
    assert measures.figures["elbo"] == found.cells[0].measures.figures["elbo"]


# ---- tables and the page -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full():
    program, data = factors()
    effort = Effort(40, 20, 4, 3, sbc_datasets=20, sbc_draws=9, reference_rows=1,
                    reference_draws=20)  # fmt: skip
    guides = {"<b>mean & field</b>": amortized(), "full_rank": amortized("full"),
              "bad {one}": Nothing()}  # fmt: skip
    return compare(
        program, guides, data, learn="guide", epochs=2, seeds=2, effort=effort,
        log_evidence=program.evidence(data["x"]), reference=program.draws(data["x"]),
        title="Fish & <chips>",
    )  # fmt: skip


def test_table_latex_and_csv(full, tmp_path):
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(full.table())
    text = console.export_text()
    assert "<b>mean & field</b>" in text
    assert "ELBO" in text
    assert "bad {one}" not in text
    assert any(note.startswith("bad {one}: not measured, ") for note in full.notes())
    html = tables.html(full.title, full.records())
    assert "&lt;b&gt;mean &amp; field&lt;/b&gt;" in html
    assert "<caption>Fish &amp; &lt;chips&gt;</caption>" in html
    latex = full.to_latex()
    assert r"full\_rank &" in latex
    assert r"$<$b$>$mean \& field$<$/b$>$ &" in latex
    assert r"90 \% covers" in latex
    assert "$\\pm$" in latex
    assert "bad" not in latex
    columns = latex.splitlines()[0].count("r") - 1  # of "tabular"
    assert all(line.count("&") - line.count(r"\&") == columns for line in latex.splitlines()[2:4])
    assert tables._tex("a{b}$~^\\") == (
        r"a\{b\}\$\textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    full.write_csv(tmp_path / "c.csv")
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["guide"], r["seed"]) for r in rows] == [(c.guide, str(c.seed)) for c in full.cells]
    assert float(rows[0]["elbo"]) == full.cells[0].measures.figures["elbo"]
    assert rows[-1]["reason"].startswith("not measured")


def test_page_has_everything_and_escapes(full, tmp_path):
    full.write(tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text("utf-8")
    assert "<title>Fish &amp; &lt;chips&gt;: which guide?</title>" in page
    assert "&lt;b&gt;mean &amp; field&lt;/b&gt;" in page
    assert "<b>mean" not in page
    assert "full_rank" in page
    assert "bad {one}" in page
    for title in ("Draws against the posterior", "Importance weighted bounds", "Pareto k-hat",
                  "Where the bound is lost", "calibration", "Coverage", "The bound in time"):  # fmt: skip
        assert title in page
    assert re.search(r"the log-evidence is -\d+\.\d{3} nats per datum", page)
    for heading in ("ELBO", "gap", "gap: family", "C2ST", "SBC p", "parameters"):
        assert f'<th scope="col">{heading}</th>' in page
        assert f"<dt>{heading}</dt>" in page
    assert "means and standard deviations over 2 seeds" in page
    assert not re.search(r"{{|{%|Undefined", page)


def test_page_without_any_optional_part(tmp_path):
    program, data = factors()
    bare = fitted(program, {"exact": Scaled(program)}, data, learn="guide")
    bare.write(tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text("utf-8")
    assert "exact" in page
    assert "Coverage" not in page
    assert "The bound in time" not in page
    empty = Comparison("t", [Cell("only", "ELBO", 0, reason="not fitted, it is not there")], 3)
    empty.write(tmp_path / "d.html")
    assert "it is not there" in (tmp_path / "d.html").read_text("utf-8")
    empty.table()
    assert "tabular" in empty.to_latex()


def test_to_arviz_has_an_object_for_each_guide():
    pytest.importorskip("arviz")
    program, data = factors()
    found = fitted(program, {"a": amortized(), "bad": Nothing()}, data, seeds=2)
    objects = found.to_arviz(data, 10)
    assert list(objects) == ["a"]
    assert objects["a"].posterior["z"].shape[1:] == (10, ROWS, 2)


def test_a_bound_above_the_evidence_is_no_figure():
    program, x = Factors(), torch.randn(ROWS, 3)
    guide = Amortized(program, ["x"], hidden=(8,))
    low = program.evidence(x) - 1000
    found = measure(program, guide, {"x": x}, effort=TINY, log_evidence=low)
    assert not {"elbo", "gap", "iwae_1"} & found.figures.keys()
    assert re.search(
        r"the bound is -\d+.*, above the evidence: a density is wrong", found.reasons["elbo"]
    )
    found = measure(program, guide, {"x": x}, effort=TINY, log_evidence=program.evidence(x))
    assert found.figures["elbo"] <= found.evidence
    assert "elbo" not in found.reasons
