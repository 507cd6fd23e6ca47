"""`selfsight bench`: the three rates, what binds, what would help; nothing is written."""

import pytest
import torch

from selfsight import bench, config

TINY = [
    "seconds=0.1", "batch_size=8", "max_steps=100", "image_size=32", "data.size=32", "data.num_train=64",
    "data.num_val=0", "num_workers=0", "backbone.depth=1", "backbone.embed_dim=32", "backbone.num_heads=2",
    "backbone.patch_size=4", "trainer.accelerator=cpu",
]  # fmt: skip


def setting(**changes):
    known = bench.Setting(1, 64, 1, 2, 8, 1, torch.device("cpu"), "32-true", False)
    return known._replace(**changes)


def numbers(**changes):
    return {"model": 100.0, "data": 1000.0, "binds": "model", "memory_share": None} | changes


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One tiny benchmark: (its numbers, what it printed, the folder it ran in)."""
    import contextlib
    import io

    folder, text = tmp_path_factory.mktemp("bench"), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(text):
        found = bench.bench(config.load("bench", TINY))
    return found, text.getvalue(), folder


def test_three_rates_are_measured(measured):
    found, _, _ = measured
    assert all(found[part] > 0 for part in ("model", "data", "end_to_end"))
    assert found["binds"] in ("model", "data", "balanced", "cores")


def test_the_table_names_all_parts_and_the_projected_time(measured):
    _, text, _ = measured
    for words in ("model alone", "data alone", "both", "100 steps = 800 images", "MFU n/a"):
        assert words in text


def test_no_mfu_where_the_peak_is_not_known(measured):
    found, _, _ = measured
    assert found["mfu_model"] is None and found["flops_per_image"] > 0


def test_no_run_folder_is_made(measured):
    _, _, folder = measured
    assert list(folder.iterdir()) == []


def test_projected_time_is_the_runs_images_over_the_rate_of_all_processes(measured):
    found, _, _ = measured
    assert found["projected_seconds"] == pytest.approx(800 / found["end_to_end"])


def test_accumulation_counts_micro_batches(measured):
    cfg = config.load("bench", [*TINY, "trainer.max_batch_per_device=2"])
    assert bench._setting(cfg).micro_batches == 4


def test_one_process_of_several_gets_its_share_of_the_batch():
    cfg = config.load("bench", [*TINY, "trainer.devices=2", "trainer.num_nodes=2"])
    assert bench._setting(cfg)[:2] == (4, 2)


def test_a_sharded_run_is_said_to_be_measured_whole(capsys):
    cfg = config.load("bench", [*TINY, "trainer.devices=2", "trainer.strategy=fsdp"])
    source = bench.open_source(cfg.data, "train")
    bench._print_setting(cfg, source, bench._setting(cfg))
    assert "trainer.strategy=fsdp is measured with whole weights" in capsys.readouterr().out
    cfg.trainer.devices = 1  # shards nothing
    bench._print_setting(cfg, source, bench._setting(cfg))
    assert "fsdp" not in capsys.readouterr().out


def test_stream_mode_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "open_source", lambda data, split: iter(()))
    with pytest.raises(ValueError, match=r"data\.mode=exact"):
        bench.bench(config.load("bench", TINY))


def test_out_of_memory_names_a_smaller_micro_batch(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "measure_model", full)
    with pytest.raises(ValueError, match=r"trainer\.max_batch_per_device=4"):
        bench.bench(config.load("bench", TINY))


@pytest.mark.parametrize(
    ("rates", "binding"),
    [
        ((100, 1000, 98, 1), "model"),
        ((1000, 100, 98, 1), "data"),
        ((100, 105, 95, 1), "balanced"),
        ((100, 120, 60, 1), "cores"),
        ((100, 120, 55, 0), "model"),
    ],
)
def test_what_binds_follows_from_the_rates(rates, binding):
    assert bench.binds(*rates) == binding


def test_windows_do_not_count_the_warm_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    windows = bench.Windows(10.0, images=4, unit=1, warm_up=3, wait_for_device=lambda: None)
    for i in range(1000):
        now[0] += 5.0 if i < 3 else 0.5  # compilation, then 8 images per second
        if windows.tick():
            break
    assert windows.rate()[:3] == pytest.approx((8.0, 8.0, 8.0))


def test_slow_batches_end_after_one_window(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    windows = bench.Windows(1.0, images=4, unit=1, warm_up=3, wait_for_device=lambda: None)
    ticks = 0
    while True:
        now[0] += 60.0
        ticks += 1
        if windows.tick():
            break
    assert ticks == 2


def test_large_images_are_to_be_prepared():
    advice = bench.advise(numbers(binds="data", data=10.0), setting(), shorter_side=1200, image_size=224)
    assert "selfsight prepare" in advice[0] and "size=256" in advice[0]


def test_idle_cores_are_to_be_used():
    advice = bench.advise(numbers(binds="data", data=50.0), setting(), shorter_side=256, image_size=224)
    assert advice == ["num_workers=4: 8 cores are here"]


def test_a_worker_that_slows_the_model_on_a_cpu_is_to_go():
    advice = bench.advise(numbers(binds="cores", data=150.0), setting(), shorter_side=64, image_size=64)
    assert advice[0].startswith("num_workers=0")


def test_small_micro_batches_on_a_roomy_gpu_are_to_grow():
    roomy = setting(device=torch.device("cuda"), precision="bf16-mixed", compiled=True, micro_batches=4)
    advice = bench.advise(numbers(memory_share=0.2), roomy, shorter_side=256, image_size=224)
    assert advice == ["trainer.max_batch_per_device=32: a micro-batch of 16 uses 20% of the memory"]


def test_full_precision_without_compilation_on_a_gpu_is_pointed_out():
    advice = bench.advise(numbers(), setting(device=torch.device("cuda")), shorter_side=256, image_size=224)
    assert [a.split(" ")[0] for a in advice] == ["trainer.precision=bf16-mixed", "trainer.compile=true"]


def test_textbook_mae_step_has_our_loss_and_gradients(benchmarks):
    import mae_step

    ours, cfg = mae_step.build(["backbone=vit_nano"])
    images = torch.randn(2, 3, cfg.image_size, cfg.image_size)
    batch = ours.draw({"key": torch.arange(2), "images": {"image": images[None]}}, 0)
    _, difference = mae_step.check(ours, mae_step.Textbook(ours), batch, images)  # asserts the same loss
    assert difference < 1e-5


DISTILL = [
    "backbone=vit_nano", "backbone.embed_dim=32", "backbone.depth=2", "backbone.drop_path=0.3", "image_size=32",
    "views.local.size=16", "views.local.n=2", "objective.head_hidden=16", "objective.head_bottleneck=8",
    "objective.num_prototypes=12", "objective.norm_last_layer=false", "objective.momentum=0.9", "optim.lr=0.01",
    "optim.clip=0.01", "backbone.pos_resize=official", "batch_size=3",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "per_crop", "keys"),
    [
        ("dino", True, []),
        ("dino", False, []),
        ("selfpatch", True, ["objective.num_patch_prototypes=6"]),
        ("selfpatch", False, ["objective.num_patch_prototypes=6", "objective.border=wrap"]),
    ],
)
def test_two_textbook_distillation_steps_lead_to_our_weights(benchmarks, name, per_crop, keys):
    import distill_step

    objective, cfg = distill_step.build(name, [*DISTILL, *keys])
    batch = distill_step.crops(objective.double(), 3)
    textbook = distill_step.TEXTBOOK[name](objective, cfg.optim, per_crop)
    ours, start = distill_step.Ours(objective, cfg.optim), objective.student["backbone"].timm.pos_embed.detach().clone()
    distill_step.check(objective, textbook, batch)  # asserts the same loss and gradients, and is no step
    for step in range(2):
        torch.testing.assert_close(textbook.gradients(batch, step), ours.gradients(batch, step), rtol=1e-9, atol=0)
        textbook.update(step)
        ours.update(step)
    assert (objective.student["backbone"].timm.pos_embed - start).abs().max() > 0.01
    for mine, theirs in ((objective.student, textbook.student), (objective.teacher, textbook.teacher)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for center, other in zip(objective.centers(), textbook.centers, strict=True):
        torch.testing.assert_close(center.center, other, rtol=0, atol=1e-9)


def test_distillation_benchmark_stops_where_the_steps_differ(benchmarks):
    import distill_step

    objective, cfg = distill_step.build("dino", DISTILL)
    textbook = distill_step.TEXTBOOK["dino"](objective, cfg.optim)
    textbook.centers[0] += torch.arange(12) / 12
    with pytest.raises(AssertionError, match="losses differ"):
        distill_step.check(objective, textbook, distill_step.crops(objective, 3))


@pytest.mark.parametrize(
    ("key", "words"), [("objective.head_batch_norm=true", "batch norm"), ("objective.koleo=0.1", "objective.koleo=0")]
)
def test_distillation_benchmark_refuses_what_the_textbook_has_not(benchmarks, key, words):
    import distill_step

    objective, cfg = distill_step.build("dino", [*DISTILL, key])
    with pytest.raises(config.ConfigError, match=words):
        distill_step.TEXTBOOK["dino"](objective, cfg.optim)


def test_distillation_benchmark_measures_all_variants_relative_to_ours(benchmarks):
    import distill_step

    args = distill_step.arguments(
        ["--batch", "2", "--repeats", "1", "--backbone", "vit_nano", "--steps", "1", *DISTILL]
    )
    found = distill_step.measure("dino", args)
    assert [label.split(",")[0] for label in found["variants"]] == ["ours", "textbook", "textbook"]
    assert found["variants"]["ours"]["ratio"] == found["variants"]["ours"]["ratio_until_gradients"] == 1.0
    assert all(
        v["milliseconds"] > v["milliseconds_until_gradients"] > 0 and "peak_mib" not in v
        for v in found["variants"].values()
    )


@pytest.mark.filterwarnings("ignore:Exception ignored in.*tar")  # webdataset leaves the shard open
def test_loader_benchmark_reads_the_same_samples_both_ways(benchmarks, tmp_path):
    import loader

    paths = loader.synthetic(tmp_path, count=3, height=48, width=64)
    source = loader.Shards(paths)
    assert loader.read_webdataset(paths, source) == loader.read_ours(source, loader.np.arange(3)) == 3


def test_ratios_of_a_comparison_are_relative_to_its_first_variant(benchmarks, monkeypatch):
    import loader

    now = [0.0]
    monkeypatch.setattr(loader, "spent", lambda: now[0])

    def taking(seconds):
        def run():
            now[0] += seconds
            return 10

        return run

    found = loader.compare({"slow": taking(4.0), "fast": taking(1.0)}, repeats=3)
    assert (found["slow"]["ratio"], found["fast"]["ratio"]) == (1.0, 4.0)


FEATURES = [
    "backbone=vit_nano", "backbone.embed_dim=32", "backbone.depth=2", "image_size=64", "objective.predictor_depth=2",
    "objective.momentum=0.9", "optim.lr=0.01", "batch_size=2",
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys"), [("ijepa", []), ("dmt_jepa", []), ("dmt_jepa", ["objective.border=wrap"])])
def test_two_textbook_steps_of_feature_prediction_lead_to_our_weights(benchmarks, name, keys):
    import feature_step

    objective, cfg = feature_step.build(name, [*FEATURES, *keys])
    batch = feature_step.crops(objective.double(), 2)
    textbook = feature_step.TEXTBOOK[name](objective, cfg.optim)
    ours, start = feature_step.Ours(objective, cfg.optim), objective.predictor.mask_token.detach().clone()
    feature_step.check(objective, textbook, batch)  # asserts the same loss and gradients, and is no step
    for step in range(2):
        torch.testing.assert_close(textbook.gradients(batch, step), ours.gradients(batch, step), rtol=1e-9, atol=0)
        textbook.update(step)
        ours.update(step)
    assert (objective.predictor.mask_token - start).abs().max() > 0.01
    for mine, theirs in ((objective.student, textbook.nets["student"]), (objective.teacher, textbook.teacher)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_feature_prediction_benchmark_refuses_what_the_textbook_has_not(benchmarks):
    import feature_step

    objective, cfg = feature_step.build("dmt_jepa", [*FEATURES, "objective.query=patch"])
    with pytest.raises(config.ConfigError, match="DMT-JEPA's defaults"):
        feature_step.TEXTBOOK["dmt_jepa"](objective, cfg.optim)


CIM = [
    "backbone=vit_nano", "backbone.embed_dim=32", "backbone.depth=2", "backbone.pos_resize=official", "image_size=32",
    "objective.exemplars=3", "objective.decoder_dim=16", "objective.decoder_heads=2", "optim.lr=0.01", "batch_size=2",
]  # fmt: skip


def test_two_textbook_cim_steps_lead_to_our_weights(benchmarks):
    import cim_step

    objective, cfg = cim_step.build(CIM)
    objective.double()
    batch, textbook = cim_step.search(objective, 2), cim_step.Textbook(objective, cfg.optim)
    ours, start = cim_step.Ours(objective, cfg.optim), objective.decoder.embed.weight.detach().clone()
    _, difference = cim_step.check(ours, textbook, batch)  # asserts the same loss and gradients, and is no step
    assert difference < 1e-5
    for step in range(2):
        torch.testing.assert_close(textbook.gradients(batch, step), ours.gradients(batch, step), rtol=1e-9, atol=0)
        textbook.update(step)
        ours.update(step)
    assert (objective.decoder.embed.weight - start).abs().max() > 1e-3
    for (name, a), b in zip(objective.teacher.named_parameters(), textbook.objective.teacher.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_cim_benchmark_refuses_batch_norms(benchmarks):
    import cim_step

    objective, cfg = cim_step.build([*CIM, "objective.sigma_cont=1", "objective.projector_hidden=8"])
    with pytest.raises(config.ConfigError, match=r"objective\.sigma_cont=0"):
        cim_step.Textbook(objective, cfg.optim)


@pytest.mark.slow
def test_adapters_are_measured_against_full_training(benchmarks):
    import adapt_step

    words = ["--backbone", "vit_nano", "--image-size", "32", "--batch", "2", "--prototypes", "8", "--repeats", "1"]
    args = adapt_step.arguments(["views.local.n=0", "backbone.depth=1", *words, "--adapt", "none", "lora", "bitfit"])
    found = adapt_step.measure(args)
    assert list(found) == ["none", "lora", "bitfit"] and found["none"]["ratio"] == 1
    assert found["lora"]["trainable_backbone"] == 2 * 8 * (128 + 128)
    for kind in ("lora", "bitfit"):
        for key in ("trainable", "held_mib"):
            assert found[kind][key] < found["none"][key], (kind, key)


def test_the_benchmark_of_adapters_stops_where_a_frozen_tensor_moves(benchmarks):
    import adapt_step

    words = ["--backbone", "vit_nano", "--image-size", "32", "--batch", "2", "--prototypes", "8"]
    args = adapt_step.arguments([*words, "views.local.n=0", "backbone.depth=1"])
    objective, stepper = adapt_step.build(args, "lora")
    batch = adapt_step.distill_step.crops(objective, 2)
    weight = objective.student["backbone"].timm.norm.weight
    stepper.optimizer.add_param_group({"params": [weight.requires_grad_()], "lr": 0.1})
    weight.requires_grad_(False)
    weight.grad = weight.new_ones(weight.shape)
    with pytest.raises(AssertionError, match="moved a frozen tensor"):
        adapt_step.check("lora", objective, stepper, batch, None)


@pytest.mark.slow
def test_the_benchmark_of_guards_times_them_in_one_process_and_in_two(benchmarks):
    import guards

    words = ["--backbones", "vit_nano", "--batch", "2", "--rounds", "1", "--calls", "3"]
    found = guards.measure(guards.arguments(words))
    assert set(found["guards"]) == {"one process", "two processes", "one collective of theirs"}
    shares = found["steps"]["vit_nano"]["shares"]
    assert set(shares) == {"one process", "two processes", "norm"} and min(shares.values()) > 0
