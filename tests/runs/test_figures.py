import numpy as np
import pytest
from matplotlib.lines import Line2D

from jaxkd.runs import figures

PNG = b"\x89PNG\r\n\x1a\n"


def test_figures_are_the_same_bytes_again(rows, metrics, tmp_path):
    for plot, values in (
        (figures.plot_curves, metrics),
        (figures.plot_accuracy, rows),
        (figures.plot_size, rows),
    ):
        plot(values, tmp_path / "first.png")
        plot(values, tmp_path / "second.png")
        content = (tmp_path / "first.png").read_bytes()
        assert content.startswith(PNG) and b"Software" not in content
        assert content == (tmp_path / "second.png").read_bytes()
        plot(values[:-1], tmp_path / "second.png")
        assert content != (tmp_path / "second.png").read_bytes()


def test_figures_take_a_single_seed_and_row(metrics, tmp_path, make_row):
    row = make_row("student", [0.8])
    seed_metrics = [metric for metric in metrics if metric["seed"] == 0]
    for plot, values in (
        (figures.plot_curves, seed_metrics),
        (figures.plot_accuracy, [row]),
        (figures.plot_size, [row]),
    ):
        plot(values, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_a_curve_is_the_mean_over_seeds_with_their_spread(metrics):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    figures._plot_curve(axes, metrics[:8], "validation_accuracy", 100, 0)
    (line,) = axes.lines
    (band,) = axes.collections
    np.testing.assert_allclose(line.get_xdata(), [100, 200, 300, 400])
    np.testing.assert_allclose(line.get_ydata(), [60.5, 75.5, 80.5, 83.0])
    heights = band.get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([heights.min(), heights.max()], [60.5 - 0.5**0.5, 83.0 + 0.5**0.5])


def test_a_stage_has_one_colour_in_every_figure(metrics, tmp_path, monkeypatch):
    colours = {}
    monkeypatch.setattr(
        figures,
        "_plot_curve",
        lambda axes, metrics, key, scale, index: (
            colours.update({metrics[0]["stage"]: index}) or Line2D([], [])
        ),
    )
    figures.plot_curves(metrics, tmp_path / "curves.png", names=["teacher", "student_alone"])
    assert colours == {"student_alone": 1, "student_direct": 2}


def test_labels_keep_apart_and_in_order():
    heights = np.array([50.0, 10.0, 12.0, 11.0, 90.0])
    placed = figures._spread_out(heights, 13)
    np.testing.assert_allclose(placed, [50, -2, 24, 11, 90])
    crowded = figures._spread_out(np.array([5.0, 5.0, 5.0, 20.0]), 13)
    assert np.diff(crowded).min() >= 13 - 1e-9 and crowded.mean() == pytest.approx(8.75)


def test_nothing_to_draw_is_refused(tmp_path, make_row):
    for plot in (figures.plot_accuracy, figures.plot_size, figures.plot_curves):
        with pytest.raises(ValueError, match="to draw"):
            plot([], tmp_path / "figure.png")
    for plot in (figures.plot_accuracy, figures.plot_size):
        with pytest.raises(ValueError, match="the row student has no accuracy to draw"):
            plot([make_row("student", [])], tmp_path / "figure.png")
    with pytest.raises(ValueError, match="each row to draw needs a number of parameters"):
        figures.plot_size([make_row("student", [0.8], parameters=None)], tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def draw(monkeypatch, plot, *args, **keywords):
    """Returns the figure that a function draws, before it is saved."""
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig

    def keep_and_save(self, *args, **keywords):
        drawn.append(self)
        return savefig(self, *args, **keywords)

    monkeypatch.setattr(Figure, "savefig", keep_and_save)
    plot(*args, **keywords)
    return drawn[-1]


@pytest.mark.parametrize(
    ("scores", "titles"),
    [
        (
            {"validation_accuracy": 0.5, "validation_loss": 1.0, "validation_rmse": 0.3},
            ["Validation loss (cross-entropy)", "Validation accuracy (%)"],
        ),
        ({"validation_rmse": 0.3, "validation_bias": 0.1}, ["Validation rmse", "Validation bias"]),
        ({"validation_loss": 1.0}, ["Validation loss (cross-entropy)"]),
        ({}, ["Loss"]),
    ],
)
def test_curves_draw_the_scores_that_there_are(scores, titles, tmp_path, monkeypatch):
    metrics = [{"seed": 0, "stage": "a", "step": s, "loss": 1.0} | scores for s in (1, 2)]
    figure = draw(monkeypatch, figures.plot_curves, metrics, tmp_path / "curves.png")
    visible = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in visible] == titles
    assert all(np.isfinite(axes.lines[0].get_ydata()).all() for axes in visible)


@pytest.mark.parametrize("name", ["$", "$$", "a$b$c", r"$\frac$", "_hidden"])
def test_any_name_is_drawn_as_it_is(name, metrics, tmp_path, make_row, monkeypatch):
    path = tmp_path / "figure.png"
    row = make_row(name, [0.8, 0.9])
    draw(monkeypatch, figures.plot_accuracy, [row], path, baseline=name)
    draw(monkeypatch, figures.plot_size, [row], path)
    named = [{**metric, "stage": name} for metric in metrics[:8]]
    figure = draw(monkeypatch, figures.plot_curves, named, path)
    (text,) = figure.legends[0].get_texts()
    drawn, is_math = text._preprocess_math(text.get_text())
    assert drawn.replace(r"\$", "$") == name and is_math in (False, "TeX")


def test_rows_are_sorted_and_coloured_against_the_baseline(tmp_path, make_row, monkeypatch):
    rows = [
        make_row("worse", [0.80, 0.82], accuracy_interval=(0.78, 0.84)),
        make_row("labels", [0.85, 0.87], accuracy_interval=(0.83, 0.89)),
        make_row("better", [0.90, 0.92], accuracy_interval=None),
    ]
    figure = draw(
        monkeypatch, figures.plot_accuracy, rows, tmp_path / "figure.png", baseline="labels"
    )
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["better", "labels", "worse"]
    level, *_ = axes.lines
    np.testing.assert_allclose(level.get_xdata(), [86, 86])
    intervals = [line.get_xdata() for line in axes.lines if line.get_linewidth() == 6]
    np.testing.assert_allclose(intervals, [[83, 89], [78, 84]])
    means = [line for line in axes.lines if line.get_markersize() == 7]
    assert [line.get_color() for line in means] == [figures.COLOURS[2], "black", figures.COLOURS[1]]
    assert axes.get_xlabel().endswith("line: labels")
    figure = draw(monkeypatch, figures.plot_accuracy, rows, tmp_path / "figure.png")
    assert all(line.get_color() == figures.COLOURS[0] for line in figure.axes[0].lines)


def test_a_record_without_a_value_leaves_a_gap(metrics, tmp_path):
    del metrics[0]["validation_accuracy"]
    metrics[1]["validation_loss"] = None
    figures.plot_curves(metrics, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
