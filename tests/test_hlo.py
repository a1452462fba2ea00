"""What is read off compiled programs is what one counts by hand, in programs that libtpu wrote and in small made-up ones."""

import itertools
import pathlib

import pytest

from sharding.hlo import arrays_of, parse
from sharding.hlo_time import Estimate, Machine, as_dict, bytes_sent, estimate, first_group
from sharding.hlo_work import Work, valid_positions
from sharding.topologies import HOST_BANDWIDTH, find_topology

FOLDER = pathlib.Path(__file__).parent / "golden" / "hlo"
# Round numbers for made-up programs: 1 TFLOP/s, 1 GB/s of HBM, 1 GHz, 0.1 GB/s a link, 1 MB/s to the host, four devices in a ring.
ROUND = Machine(
    peak=1e12, bandwidth=1e9, clock=1e9, link=1e8, dcn=1e7, host=1e6, places=tuple((0, n) for n in range(4)), torus=4
)


def machine(product: str, slices: int = 1) -> Machine:
    """Devices in the order of their coordinates."""
    t = find_topology(product, slices)
    places = tuple(itertools.product(range(slices), *map(range, t.shape)))
    return Machine(t.peak, t.bandwidth, t.chip.clock, t.chip.link, t.chip.dcn, HOST_BANDWIDTH, places, t.chip.torus)


def golden(name: str, product: str, slices: int = 1) -> Estimate:
    return estimate((FOLDER / f"{name}.txt").read_text(), machine(product, slices))


def made_up(entry: str, *computations: str) -> Estimate:
    """Of a program of which only instructions are given."""
    body = "\n".join(f"  {line.strip()}" for line in entry.strip().splitlines())
    return estimate("\n\n".join([*computations, f"ENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}"]), ROUND)


# Programs as libtpu compiled them; see tests/golden/make_hlo.py.


@pytest.mark.parametrize(("product", "ratio"), [("v5e-4", 1.03), ("v5p-8", 1.04), ("v6e-4", 1.15)])
def test_a_matrix_product_takes_a_little_longer_than_at_peak(product, ratio):
    """Ratios of the compiler's cycles to the peak, as measured with another reader of the same compiler's output."""
    found, t = golden(f"matmul_{product}", product), find_topology(product)
    assert found.flops == 2 * 4096**3
    assert found.bytes == 3 * 2 * 4096**2
    # One matrix goes to VMEM first, while the step before ends.
    assert found.seconds / (2 * 4096**3 / t.peak) == pytest.approx(ratio, abs=0.005)
    assert found.bound == pytest.approx(2 * 4096**3 / t.peak)


def test_an_addition_takes_as_long_as_its_bytes():
    found = golden("add", "v5e-4")
    assert (found.flops, found.bytes) == (0, 3 * 2 * 8192**2)
    assert found.seconds == found.bound == found.bytes / 819e9


@pytest.mark.parametrize(("name", "products"), [("scanned_mlp", 2), ("scanned_mlp_gradient", 6)])
def test_a_scanned_layer_counts_as_often_as_it_runs(name, products):
    found = golden(name, "v5e-4")
    assert found.flops == 6 * products * 2 * 1024 * 512 * 2048
    assert not found.unread


def test_a_scan_reads_of_stacked_weights_one_layer_a_turn():
    found = golden("scanned_mlp", "v5e-4")
    weights, activations = 6 * 2 * 512 * 2048 * 2, 2 * 1024 * 512 * 2  # the first comes in, the last goes out
    assert found.bytes == pytest.approx(weights + activations, abs=200)  # and some loop counters


def test_a_gather_sends_a_devices_part_to_all_others():
    found = golden("gather", "v5e-8")
    (traffic,) = found.collectives.values()
    part = 1024 * 4096 * 2
    assert (traffic.count, traffic.bytes) == (1, 7 * part)
    assert traffic.seconds == pytest.approx(
        7 * part / (2 * 45e9)
    )  # one link along each axis of 2x4: nothing goes around
    assert found.exposed == traffic.seconds


def test_gathers_hide_behind_the_layers_before():
    """Three layers over eight devices: the first weights are waited for, the others come while a layer multiplies."""
    found = golden("layers_over_fsdp", "v5e-8")
    traffic = found.collectives["all-gather", "ICI"]
    one = 7 * 2048 * 256 * 2
    assert (traffic.count, traffic.bytes) == (3, 3 * one)
    assert found.exposed == pytest.approx(one / (2 * 45e9))
    assert found.flops == 3 * 2 * 2048**3


def test_slices_exchange_what_is_left_of_a_sum_within_each():
    found = golden("mean_over_slices", "v5e-4", 2)
    part = 1024 * 1024 * 2
    bytes_of = {key: traffic.bytes for key, traffic in found.collectives.items()}
    quarter = part / 4
    assert bytes_of == {
        ("reduce-scatter", "ICI"): 3 * quarter,
        ("all-reduce", "DCN"): quarter,
        ("all-gather", "ICI"): 3 * quarter,
    }
    assert found.collectives["all-reduce", "DCN"].exposed == pytest.approx(quarter / 3.125e9)


# Made-up programs.

GATHER = "replica_groups={{0,1,2,3}}, dimensions={0}"
ADD_1_MS = "%b = f32[125000]{0} add(%a, %a)"  # reads and writes half a megabyte each


def test_a_collective_is_hidden_by_what_runs_between_its_start_and_its_end():
    found = made_up(f"""
        %p = f32[25000]{{0}} parameter(0)
        %a = f32[125000]{{0}} parameter(1)
        %start = (f32[25000]{{0}}, f32[100000]{{0}}) all-gather-start(%p), {GATHER}
        {ADD_1_MS}
        ROOT %done = f32[100000]{{0}} all-gather-done(%start)""")
    sending = 3 * 1e5 / (2 * 1e8)  # three other devices, links to both sides
    assert found.compute == pytest.approx(1e-3)
    assert found.collectives["all-gather", "ICI"].seconds == pytest.approx(sending)
    assert found.exposed == pytest.approx(sending - 1e-3)
    assert found.seconds == found.bound == pytest.approx(sending)


def test_a_collective_may_be_waited_for_under_another_name():
    found = made_up(
        f"""
        %p = f32[25000]{{0}} parameter(0)
        %a = f32[125000]{{0}} parameter(1)
        %start = ((f32[25000]{{0}}), f32[100000]{{0}}) async-start(%p), calls=%gather
        %update = ((f32[25000]{{0}}), f32[100000]{{0}}) async-update(%start)
        %done = f32[100000]{{0}} async-done(%update)
        ROOT {ADD_1_MS}""",
        f"""%gather (p: f32[25000]) -> f32[100000] {{
  %q = f32[25000]{{0}} parameter(0)
  ROOT %g = f32[100000]{{0}} all-gather(%q), {GATHER}
}}""",
    )
    assert found.exposed == pytest.approx(3 * 1e5 / 2e8)


def test_a_collective_of_a_sparse_core_runs_beside_the_schedule():
    """As libtpu writes it: a call, whose computation closes with the name of who runs it."""
    found = made_up(
        f"""
        %p = f32[25000]{{0}} parameter(0)
        %a = f32[125000]{{0}} parameter(1)
        %token = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
        %start = ((f32[25000]{{0}}, token[]), f32[100000]{{0}}) call-start(%p, %token), to_apply=%gather
        {ADD_1_MS}
        ROOT %done = f32[100000]{{0}} call-done(%start)""",
        f"""%gather (p: f32[25000], t: token[]) -> f32[100000] {{
  %q = f32[25000]{{0}} parameter(0)
  %t = token[] parameter(1)
  ROOT %g = f32[100000]{{0}} all-gather(%q), {GATHER}
}}, execution_thread="sparsecore\"""",
    )
    sending = 3 * 1e5 / 2e8
    assert found.collectives["all-gather", "ICI"].seconds == pytest.approx(sending)
    assert found.exposed == pytest.approx(sending - 1e-3)
    assert found.compute == pytest.approx(1e-3)


def test_a_collective_without_a_window_holds_everything_up():
    found = made_up(f"""
        %p = f32[25000]{{0}} parameter(0)
        %a = f32[125000]{{0}} parameter(1)
        %all-reduce = f32[25000]{{0}} all-reduce(%p), replica_groups={{{{0,1,2,3}}}}, to_apply=%sum
        ROOT {ADD_1_MS}""")
    assert found.exposed == pytest.approx(2 * 3 / 4 * 1e5 / 2e8)
    assert found.seconds == pytest.approx(1e-3 + found.exposed)


def test_waiting_for_a_collective_that_stood_behind_another_is_the_others_doing():
    found = made_up(f"""
        %p = f32[25000]{{0}} parameter(0)
        %start = (f32[25000]{{0}}, f32[100000]{{0}}) all-gather-start(%p), {GATHER}
        %sum = f32[25000]{{0}} all-reduce(%p), replica_groups={{{{0,1,2,3}}}}, to_apply=%sum
        ROOT %done = f32[100000]{{0}} all-gather-done(%start)""")
    gather, reduce = (found.collectives[kind, "ICI"] for kind in ("all-gather", "all-reduce"))
    assert gather.exposed == pytest.approx(gather.seconds)
    assert reduce.exposed == pytest.approx(reduce.seconds)
    assert found.compute == 0


def test_a_network_carries_one_collective_at_a_time():
    """Both gathers start at 0; the second has 1 ms of an addition to hide behind, once the first is there."""
    found = made_up(f"""
        %p = f32[25000]{{0}} parameter(0)
        %a = f32[125000]{{0}} parameter(1)
        %first = (f32[25000]{{0}}, f32[100000]{{0}}) all-gather-start(%p), {GATHER}
        %second = (f32[25000]{{0}}, f32[100000]{{0}}) all-gather-start(%p), {GATHER}
        %done.1 = f32[100000]{{0}} all-gather-done(%first)
        {ADD_1_MS}
        ROOT %done.2 = f32[100000]{{0}} all-gather-done(%second)""")
    assert found.exposed == pytest.approx(1.5e-3 + 0.5e-3)
    assert found.seconds == found.bound == pytest.approx(3e-3)


def test_groups_on_different_slices_use_the_slow_network():
    two = Machine(1e12, 1e9, 1e9, 1e8, 1e7, 1e7, places=((0, 0), (0, 1), (1, 0), (1, 1)), torus=4)
    text = "ENTRY %main (p: f32[]) -> f32[] {\n  %p = f32[250]{0} parameter(0)\n  ROOT %r = f32[250]{0} all-reduce(%p), GROUPS\n}"
    across = estimate(text.replace("GROUPS", "replica_groups={{0,2},{1,3}}"), two)
    assert across.collectives["all-reduce", "DCN"].seconds == pytest.approx(1000 / 1e7)
    within = estimate(text.replace("GROUPS", "replica_groups=[2,2]<=[4]"), two)
    assert within.collectives["all-reduce", "ICI"].seconds == pytest.approx(1000 / 1e8)


LOOP = """%body (c: (s32[])) -> (s32[]) {
  %c = (s32[], f32[125000]{0}) parameter(0)
  %a = f32[125000]{0} get-tuple-element(%c), index=1
  %b = f32[125000]{0} add(%a, %a)
  ROOT %t = (s32[], f32[125000]{0}) tuple(%i, %b)
}"""
ENDS = """%ends (c: (s32[])) -> pred[] {
  %c = (s32[], f32[125000]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(24)
  ROOT %less = pred[] compare(%i, %n), direction=DIRECTION
}"""
WHILE = """%p = (s32[], f32[125000]{0}) parameter(0)
    ROOT %while = (s32[], f32[125000]{0}) while(%p), condition=%ends, body=%body"""


def test_a_loop_takes_its_turns_and_an_unknown_number_is_said():
    assert made_up(WHILE, LOOP, ENDS.replace("DIRECTION", "LT")).seconds == pytest.approx(24e-3)
    unknown = made_up(WHILE, LOOP, ENDS.replace("DIRECTION", "NE"))
    assert unknown.seconds == pytest.approx(1e-3)
    assert list(unknown.unread.values()) == [1]


def test_a_loop_whose_first_turn_was_peeled_off_takes_one_less():
    peeled = """%one = s32[] constant(1)
    %begins = s32[] copy(%one)
    %a = f32[125000]{0} parameter(0)
    %p = (s32[], f32[125000]{0}) tuple(%begins, %a)
    ROOT %while = (s32[], f32[125000]{0}) while(%p), condition=%ends, body=%body"""
    found = made_up(peeled, LOOP, ENDS.replace("DIRECTION", "LT"))
    assert found.seconds == pytest.approx(23e-3, rel=1e-5)


def test_a_loop_hides_a_collective_that_is_under_way():
    around = f"""%p = (s32[], f32[125000]{{0}}) parameter(0)
        %q = f32[25000]{{0}} parameter(1)
        %start = (f32[25000]{{0}}, f32[100000]{{0}}) all-gather-start(%q), {GATHER}
        %while = (s32[], f32[125000]{{0}}) while(%p), condition=%ends, body=%body
        ROOT %done = f32[100000]{{0}} all-gather-done(%start)"""
    assert made_up(around, LOOP, ENDS.replace("DIRECTION", "LT")).exposed == 0


def test_a_conditional_takes_as_long_as_its_longest_branch():
    def branch(name: str, elements: int) -> str:
        given = f"  %p = f32[{elements}]{{0}} parameter(0)\n  ROOT %n = f32[{elements}]{{0}} negate(%p)"
        return f"%{name} (p: f32[]) -> f32[] {{\n{given}\n}}"

    found = made_up(
        "%i = s32[] parameter(0)\nROOT %c = f32[] conditional(%i, %a, %b), branch_computations={%short, %long}",
        branch("short", 1000),
        branch("long", 125000),
    )
    assert found.seconds == pytest.approx(1e-3)


def fusion(body: str, call: str) -> Estimate:
    return made_up(
        call,
        "%fused (p: f32[]) -> f32[] {\n" + "\n".join(f"  {line.strip()}" for line in body.strip().splitlines()) + "\n}",
    )


def test_an_update_in_place_moves_the_update_alone():
    found = fusion(
        """%p = f32[100,1000]{1,0} parameter(0)
        %u = f32[1,1000]{1,0} parameter(1)
        %i = s32[] parameter(2)
        ROOT %d = f32[100,1000]{1,0} dynamic-update-slice(%p, %u, %i, %i)""",
        """%p = f32[100,1000]{1,0} parameter(0)
        %u = f32[1,1000]{1,0} parameter(1)
        %i = s32[]{:S(6)} parameter(2)
        ROOT %f = f32[100,1000]{1,0} fusion(%p, %u, %i), kind=kLoop, calls=%fused""",
    )
    assert found.bytes == 2 * 4000


def test_of_a_sliced_array_the_slice_is_read_and_what_lies_in_vmem_is_free():
    found = fusion(
        """%p = f32[100,1000]{1,0} parameter(0)
        %v = f32[1,1000]{1,0:S(1)} parameter(1)
        %i = s32[] parameter(2)
        %s = f32[1,1000]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,1000}
        ROOT %d = f32[1,1000]{1,0} add(%s, %v)""",
        """%p = f32[100,1000]{1,0} parameter(0)
        %v = f32[1,1000]{1,0:S(1)} parameter(1)
        %i = s32[]{:S(6)} parameter(2)
        ROOT %f = f32[1,1000]{1,0:S(1)} fusion(%p, %v, %i), kind=kLoop, calls=%fused""",
    )
    assert found.bytes == 4000


def test_an_elementwise_fusion_is_not_charged_the_compilers_cycles():
    """They are two to five times too many for what HBM limits."""
    found = made_up(
        "%a = f32[125000]{0} parameter(0)\nROOT " + ADD_1_MS + ', backend_config={"estimated_cycles":"9000000"}'
    )
    assert found.seconds == pytest.approx(1e-3)


def test_a_call_that_only_tells_the_compiler_something_costs_nothing():
    found = made_up("""%a = f32[125000]{0} parameter(0)
        ROOT %b = f32[125000]{0} custom-call(%a), custom_call_target="AssumeGatherIndicesInBound\"""")
    assert (found.bytes, found.seconds, found.unread) == (0, 0, {})


def test_a_kernel_takes_what_its_cost_estimate_says():
    kernel = """%q = bf16[8,128]{1,0} parameter(0)
        ROOT %k = bf16[8,128]{1,0} custom-call(%q), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":COST}"""
    known = made_up(
        kernel.replace(
            "COST", '{"cost_estimate":{"flops":"3000000000","transcendentals":"0","bytes_accessed":"2000000"}}'
        )
    )
    assert (known.flops, known.bytes, known.seconds) == (3e9, 2e6, 3e-3)
    assert not known.unread
    unknown = made_up(kernel.replace("COST", "{}"))
    assert (unknown.flops, unknown.bytes) == (0, 2 * 2 * 8 * 128)
    assert list(unknown.unread.values()) == [1]


@pytest.mark.parametrize(("kernel", "products", "pairs"), [("fwd", 2, 7), ("dkv", 4, 11), ("dq", 3, 13)])
def test_splash_attention_multiplies_the_blocks_that_are_seen(kernel, products, pairs):
    found = made_up(
        f"""%q = bf16[2,8,512,256]{{3,2,1,0}} parameter(0)
        ROOT %k = bf16[2,8,512,256]{{3,2,1,0}} custom-call(%q), custom_call_target="tpu_custom_call",
        metadata={{op_name="jit(f)/pairs_7_11_13/splash_mha_{kernel}_segmented"}}""".replace(",\n", ",")
    )
    assert found.flops == 2 * products * pairs * 2 * 8 * 256


def convolution(text: str) -> float:
    """FLOPs of `image kernel -> output, attributes`."""
    shapes, attributes = text.split("; ")
    image, kernel, output = shapes.split()
    module = parse(
        f"ENTRY %main (p: f32[]) -> f32[] {{\n  %i = bf16[{image}] parameter(0)\n  %k = bf16[{kernel}] parameter(1)\n"
        f"  ROOT %c = bf16[{output}] convolution(%i, %k), {attributes}\n}}"
    )
    return Work(module).flops(module.entry, module.entry.root)


def test_convolutions_count_products_with_the_image_alone():
    # 3x3, stride 1, padded: of 8x8 places 6x6 see all nine, 4*6 see six, 4 corners see four.
    seen = 36 * 9 + 24 * 6 + 4 * 4
    same = convolution("5,8,8,16 3,3,16,32 5,8,8,32; window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f")
    assert same == 2 * 5 * 16 * 32 * seen
    halved = convolution("5,8,8,16 2,2,16,32 5,4,4,32; window={size=2x2 stride=2x2}, dim_labels=b01f_01io->b01f")
    assert halved == 2 * 5 * 16 * 32 * 16 * 4
    grouped = convolution(
        "5,8,8,16 1,1,4,32 5,8,8,32; window={size=1x1}, dim_labels=b01f_01io->b01f, feature_group_count=4"
    )
    assert grouped == 2 * 5 * 4 * 32 * 64


def test_places_that_a_window_sees_are_those_of_a_loop():
    for sizes in itertools.product((1, 4, 7), (1, 3), (1, 2), (0, 1, 2), (1, 2), (1, 3)):
        image, kernel, stride, padding, image_dilation, kernel_dilation = sizes
        extent = (image - 1) * image_dilation + 1
        output = max(0, (extent + 2 * padding - ((kernel - 1) * kernel_dilation + 1)) // stride + 1)
        seen = 0
        for o, k in itertools.product(range(output), range(kernel)):
            at = o * stride + k * kernel_dilation - padding
            seen += 0 <= at < extent and at % image_dilation == 0
        assert valid_positions(image, kernel, output, *sizes[2:]) == seen, sizes


def test_arrays_are_read_with_their_memory():
    found = arrays_of("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, f8e4m3fn[16]{0}, /*index=3*/ s4[10]{0})")
    assert [(a.dtype, a.bytes, a.hbm_bytes) for a in found] == [
        ("bf16", 2048, 0),
        ("s32", 4, 4),
        ("f8e4m3fn", 16, 16),
        ("s4", 5, 5),
    ]


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,4},{1,5}}", [0, 4]),
        ("replica_groups={}", list(range(8))),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", [0, 4]),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", [0, 4]),
        ("source_target_pairs={{0,3},{3,0}}", [0, 3]),
    ],
)
def test_groups_are_read_in_every_notation(written, group):
    assert first_group(written, 8) == group


def test_bytes_that_a_device_sends_are_those_of_the_shortest_algorithms():
    expected = {"all-gather": 300, "all-reduce": 150, "reduce-scatter": 75, "all-to-all": 75, "collective-permute": 100}
    assert {kind: bytes_sent(kind, 100, 4) for kind in expected} == expected


def test_links_go_around_where_a_group_fills_a_ring():
    v5e = machine("v5e-256")
    row, half, everything, pair = range(16), range(8), range(256), (0, 1)
    assert [v5e.links(group) for group in (row, half, everything, pair)] == [2, 1, 4, 1]
    v5p = machine("v5p-128")  # 4x4x4: a cube's axes close
    assert [v5p.links(group) for group in (range(4), range(16), range(64))] == [2, 4, 6]
    assert machine("v5e-16", 2).links((0, 16)) == 0


def test_an_exchange_takes_what_crosses_the_middle_of_its_longest_axis():
    """Every device sends 1/n of 256 MB to each of n: of an axis of 16, half of its devices send half of all they have across
    the middle, where a closed axis has two links a row."""
    sent, link = 256e6, 45e9
    v5e, v5p = machine("v5e-256"), machine("v5p-128")
    across = 8 * sent / 2  # of the 16 devices in a row, one way
    assert v5e.exchange(range(16), sent) == pytest.approx(across / (2 * link))
    assert v5e.exchange(range(256), sent) == pytest.approx(across / (2 * link))  # all rows at once
    assert v5e.exchange(range(8), sent) == pytest.approx(4 * sent / 2 / link)  # half a ring is a line
    assert v5p.exchange(range(64), sent) == pytest.approx(2 * sent / 2 / (2 * v5p.link))
    assert machine("v5e-16", 2).exchange((0, 16), sent) == sent / machine("v5e-16", 2).dcn


def test_a_collective_on_the_channel_of_one_under_way_is_another():
    """All that comes from shard_maps has channel 1; a loss reduces and scatters while it gathers."""
    text = """%start (p: f32[25000]) -> (f32[100000], f32[25000]) {
  %p = f32[25000]{0} parameter(0)
  %g = f32[100000]{0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %c = f32[] custom-call(%g), custom_call_target="AsyncCollectiveStart"
  ROOT %t = (f32[100000]{0}, f32[25000]{0}) tuple(%g, %p)
}

%done (q: (f32[100000], f32[25000])) -> f32[100000] {
  %q = (f32[100000]{0}, f32[25000]{0}) parameter(0)
  %p.1 = f32[25000]{0} get-tuple-element(%q), index=1
  %g.1 = f32[100000]{0} all-gather(%p.1), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %d = f32[100000]{0} custom-call(%g.1), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[25000], b: f32[100000]) -> (f32[100000], f32[25000]) {
  %a = f32[25000]{0} parameter(0)
  %b = f32[100000]{0} parameter(1)
  %f = (f32[100000]{0}, f32[25000]{0}) fusion(%a), kind=kCustom, calls=%start
  %r = f32[25000]{0} reduce-scatter(%b), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %e = f32[100000]{0} fusion(%f), kind=kCustom, calls=%done
  ROOT %t.1 = (f32[100000]{0}, f32[25000]{0}) tuple(%e, %r)
}"""
    sent = {kind: (t.count, t.bytes) for (kind, _), t in estimate(text, machine("v5e-4")).collectives.items()}
    assert sent == {"all-gather": (1, 3 * 100_000), "reduce-scatter": (1, 3 * 100_000)}


def test_a_gather_in_one_ring_uses_two_links_of_a_torus():
    """What libtpu does with all 256 chips of a v5e pod, each of which has four."""
    text = """ENTRY %main (p: f32[]) -> f32[] {
  %p = bf16[1000]{0} parameter(0)
  ROOT %g = bf16[256000]{0} all-gather(%p), replica_groups=[1,256]<=[256], dimensions={0}, EMITTER
}"""

    def seconds(emitter: str) -> float:
        return estimate(text.replace("EMITTER", emitter), machine("v5e-256")).seconds

    ring = seconds('backend_config={"collective_algorithm_config":{"emitter":"1DAllGatherNonMajorDim"}}')
    assert ring == pytest.approx(255 * 2000 / (2 * 45e9))
    assert seconds("backend_config={}") == pytest.approx(ring / 2)


def test_the_json_says_what_the_estimate_says():
    found = as_dict(golden("layers_over_fsdp", "v5e-8"))
    assert found["seconds"] == pytest.approx(found["compute"] + found["exposed"])
    assert [(c["kind"], c["network"], c["count"]) for c in found["collectives"]] == [("all-gather", "ICI", 3)]
