"""Costs of a step: values worked by hand, and XLA's counts and programs."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks import cost
from experiments.benchmarks.step_cost import communication, compiled_parts, layers, pairs
from experiments.benchmarks.step_cost.collectives import Collective, find_collectives, total
from experiments.benchmarks.step_cost.communication import PMAP, Sizes, expect
from experiments.benchmarks.step_cost.machines import Line, find_bounds
from experiments.benchmarks.training_cases import LSTM, RESNET_20, SMALL_CNN, Network, jax_model
from experiments.common.cli import OptionError
from jaxkd import distill, models

# The parser


PROGRAM = """HloModule jit_step, is_scheduled=true, replica_count=1, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%scatter (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  ROOT %reduce-scatter = f32[8]{0} reduce-scatter(%p), channel_id=4, replica_groups=[1,8]<=[8], \
dimensions={0}, to_apply=%add
}

%body (state: (s32[], bf16[16])) -> (s32[], bf16[16]) {
  %state = (s32[], bf16[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %h = bf16[16]{0} get-tuple-element(%state), index=1
  %permuted = bf16[16]{0} collective-permute(%h), channel_id=5, source_target_pairs={{0,1},{1,0}}
  ROOT %next = (s32[], bf16[16]{0}) tuple(%i, %permuted)
}

%condition (state.1: (s32[], bf16[16])) -> pred[] {
  %state.1 = (s32[], bf16[16]{0}) parameter(0)
  ROOT %more = pred[] constant(false)
}

ENTRY %main (a: f32[10,2], b: f32[3], c: u8[64], d: f32[64], e: (s32[], bf16[16])) -> f32[8] {
  %a = f32[10,2]{1,0} parameter(0)
  %b = f32[3]{0:T(128)} parameter(1)
  %c = u8[64]{0} parameter(2)
  %d = f32[64]{0} parameter(3)
  %e = (s32[], bf16[16]{0}) parameter(4)
  %all-reduce = (f32[10,2]{1,0}, /*index=1*/f32[3]{0:T(128)}) all-reduce(%a, /*index=1*/%b), \
channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  %start = (u8[64]{0}, u8[512]{0}) all-gather-start(u8[64]{0} %c), channel_id=2, \
replica_groups=mesh['data'=8,'model'=1] {'data'}, dimensions={0}
  %done = u8[512]{0} all-gather-done(%start)
  %alone = f32[64]{0} all-reduce(%d), channel_id=3, replica_groups=[8,1]<=[8], to_apply=%add
  %exchanged = f32[64]{0} all-to-all(%alone), channel_id=6, replica_groups=[4,2]<=[2,4]T(1,0)
  %scatter-start = ((f32[64]{0}), f32[8]{0}) async-start(%exchanged), calls=%scatter
  %loop = (s32[], bf16[16]{0}) while(%e), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"31"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %scattered = f32[8]{0} async-done(%scatter-start), calls=%scatter
}
"""


def test_collectives_of_a_program_worked_by_hand():
    assert find_collectives(PROGRAM) == [
        Collective("all-reduce", 4 * (20 + 3), 4),
        Collective("all-gather", 8 * 64, 8),
        Collective("all-to-all", 4 * 64, 2),
        Collective("reduce-scatter", 4 * 64, 8),
        Collective("collective-permute", 2 * 16, 2, 31),
    ]
    sums = total(find_collectives(PROGRAM))
    assert sums["all-reduce"] == {"operations": 1, "payload": 92, "sent": 2 * 92 * 3 / 4}
    assert sums["reduce-scatter"]["sent"] == 256 * 7 / 8
    assert sums["collective-permute"] == {"operations": 31, "payload": 992, "sent": 992.0}


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{}", 8),
        ("{{0,4},{1,5}}", 2),
        ("[2,4]<=[8]", 4),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['data'=4,'model'=2] {'model'}", 2),
        ("mesh['data'=4,'model'=2] {'data','model'}", 8),
        ("mesh['data'=8] {'data':(2)4}", 4),
    ],
)
def test_forms_of_replica_groups(groups, size):
    program = PROGRAM.replace("{{0,1,2,3},{4,5,6,7}}", groups)
    assert find_collectives(program)[0].group_size == size


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "everyone", "unknown form"),
        ('"known_trip_count"', '"unknown"', "number of iterations"),
        ("ENTRY ", "", "no ENTRY"),
    ],
)
def test_what_the_parser_does_not_know_is_an_error(old, new, message):
    with pytest.raises(ValueError, match=message):
        find_collectives(PROGRAM.replace(old, new))


def test_gradients_of_a_compiled_step_on_two_devices_are_summed_once():
    pair = pairs.Pair("tiny", Network("CNN", ((8,), 8)), Network("CNN", ((4,), 4)))
    mesh = distill.make_mesh(devices=jax.devices()[:2])
    whole, divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    def put(tree, sharding):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    teacher, student = pair.models()
    batch, key, tx = pair.shapes(8), jax.random.key(0), pairs.make_optimizer()
    teacher_variables, variables = (
        jax.eval_shape(model.init, key, batch["inputs"]) for model in (teacher, student)
    )
    state = jax.eval_shape(lambda v: distill.init_train_state(v, tx), variables)
    step = distill.make_train_step(student, tx, pairs.distillation_loss, teachers=[teacher])
    arguments = put(state, whole), put(batch, divided), put((teacher_variables,), whole)
    program = jax.jit(step).lower(*arguments, key).compile().as_text()
    parameters = communication.find_sizes(pair).parameters
    # The mean of the loss is a sum as well.
    assert total(find_collectives(program))["all-reduce"]["payload"] == 4 * (parameters + 1)


# Layers


def test_costs_of_layers_worked_by_hand():
    # 3 taps inside and 2 at each end, in both directions.
    assert layers.count_taps(4, 3, 1, (1, 1)) == 10
    assert layers.count_taps(5, 3, 2, (0, 1)) == 6
    convolution = layers.conv((2, 4, 4, 3), (2, 4, 4, 8), (3, 3, 3, 8), 10 * 10)
    assert convolution == layers.Layer(2 * 2 * 100 * 3 * 8, 96, 256, 216, 216)
    assert layers.dense((2, 5, 3), 4) == layers.Layer(2 * 10 * 12, 30, 40, 12, 12)
    assert layers.embedding((2, 5), 100, 4) == layers.Layer(0, 10, 40, 40, 400)
    # Per token 2 · 4 gates · H · (D + H); the last 4 of 5 steps of the recurrent half repeat.
    assert layers.lstm((2, 5, 3), 4) == layers.Layer(
        2 * 10 * 16 * 7, 30, 40, (3 + 5 * 4) * 16, 7 * 16, 2 * 8 * 4 * 16
    )
    assert layers.attention(2, 3, 5, 4).flops == 2 * 2 * (2 * 3 * 5 * 5) * 4
    assert layers.optimizer(7) == layers.Cost(28, 140)


def test_backward_pass_is_twice_the_forward_pass_but_for_the_first_layer():
    network = [layers.dense((2, 3), 4), layers.dense((2, 4), 5)]
    assert layers.forward(network).flops == 48 + 80
    assert layers.backward(network).flops == 48 + 2 * 80
    first = 4 * (6 + 8 + 12)
    second = 2 * 4 * (8 + 10) + 4 * (20 + 20)
    assert layers.backward(network).bytes == first + second
    assert layers.forward(network, item_bytes=2).bytes == 2 * (14 + 18) + 4 * 32


@pytest.mark.parametrize(
    ("network", "on_texts", "train"),
    [
        (SMALL_CNN, False, True),
        (Network("CNN", ((), 64)), False, True),
        (RESNET_20, False, False),
        (Network("CifarResNet", (1,)), False, True),
        (LSTM, True, False),
        (Network("BERT", (99, 256, 1, 4, 1024), {"pooling": models.mean_pooling}), True, False),
    ],
    ids=lambda value: f"{value.name}{value.arguments}" if isinstance(value, Network) else "",
)
def test_flops_on_paper_are_those_that_xla_counts(network, on_texts, train):
    """Within 10 %, which the elementwise operations take that the formulas leave out."""
    pair = pairs.Pair("pair", network, network, on_texts)
    model, inputs = jax_model(network, bf16=False), pair.shapes(4)["inputs"]
    found = layers.find_layers(model, inputs, train=train)
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    if train:
        logits = jax.ShapeDtypeStruct((4, 10), jnp.float32)
        counted = compiled_parts.count(
            compiled_parts.pull_back(model), variables, inputs, logits
        ).flops
        paper = layers.add(layers.forward(found), layers.backward(found)).flops
    else:
        counted = compiled_parts.count(compiled_parts.predict(model), variables, inputs).flops
        paper = layers.forward(found).flops - layers.repeated(found)
    assert 1 <= counted / paper < 1.1


# Communication


def test_communication_worked_by_hand():
    sizes = Sizes(parameters=100, channels=3, divided=40, example=12, arrays=2, classes=10)
    assert expect("vectorised", sizes, devices=4, batch=8) == {}
    assert expect("mesh", sizes, devices=1, batch=8) == {}
    mesh = expect("mesh", sizes, devices=4, batch=8)
    assert mesh["gradients"].sent == 2 * 400 * 3 / 4
    assert mesh["examples"].sent == 2 * 8 * 12 * 3 / 4
    assert expect("mesh, model=2", sizes, devices=4, batch=8)["teacher"].sent == 160 / 2
    pmap = expect(PMAP, sizes, devices=4, batch=8)
    assert pmap["logits"] == Collective("all-gather", 320, 4, 2) and "examples" not in pmap


def check_rows(rows):
    """Checks that programs send what the formulas say."""
    for row in rows:
        if row["placement"] == communication.MODEL_MESH:
            # XLA joins a weight of the teacher, or divides its product and exchanges the results.
            assert row["compiled_sent"] > row["paper"]["gradients"], row
        else:
            assert row["compiled_sent"] == pytest.approx(row["paper_sent"], rel=1e-3), row


@pytest.mark.thorough  # starts processes of its own
def test_tiny_run(benchmark):
    folder, printed = benchmark("benchmarks.cost", "--tiny")
    results = json.loads((folder / "results.json").read_text())
    check_rows(results["communication"])
    assert {(row["devices"], row["processes"]) for row in results["communication"]} == {
        (1, 1),
        (2, 1),
        (2, 2),
    }
    assert (folder / "tables.md").read_text() in printed
    assert "tiny LSTM" in printed


# Machines


def test_bounds_are_the_upper_envelope():
    lines = {"links": Line(10.0, 0.0), "memory": Line(4.0, 1.0), "compute": Line(0.0, 2.0)}
    # 4 + b reaches 10 at 6, but 2 b does so at 5.
    assert find_bounds(lines) == [(1, "links"), (5, "compute")]
    assert find_bounds({"links": Line(10.0, 0.0), "memory": Line(4.0, 1.0)}) == [
        (1, "links"),
        (6, "memory"),
    ]


def test_line_goes_through_two_points():
    assert Line.through((8, 20.0), (16, 36.0)) == (4.0, 2.0)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"placed_batch_size": 12},
        {"devices": ()},
        {"devices": (0,)},
        {"processes": (3,)},
        {"only": ("vgg",)},
        {"only": ("cnn",), "placed_only": ("lstm",)},
    ],
)
def test_invalid_options_are_refused(options):
    with pytest.raises(OptionError):
        cost.Config(**options).check()
