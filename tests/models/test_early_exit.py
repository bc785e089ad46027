import copy
import math
import pickle
import threading
import warnings
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification, pipeline

from hf_selfkd import EarlyExitOutput, ExitPolicy, MultiExitForImageClassification, MultiExitOutput
from hf_selfkd.deploy.pipeline import EarlyExitPipeline
from hf_selfkd.models.criteria import CRITERIA
from hf_selfkd.models.early_exit import CPU_IMAGES_PER_THREAD
from tests.helpers.models import DEIT, SWIN, build_copy
from tests.helpers.processes import forkserver

CHAINS = {
    "test_resnet": {},
    "test_vit": {"img_size": 32, "patch_size": 8},
    "test_convnext": {},
    "test_efficientnet": {},
    "swin_tiny_patch4_window7_224": SWIN,  # NHWC maps
    "deit_tiny_distilled_patch16_224": DEIT,  # two classifiers
    "tnt_s_legacy_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 4},  # several rows per image
    "pit_ti_224": {"img_size": 32, "patch_size": 4, "stride": 2, "base_dims": (8, 8, 8)},  # stages end in tuples
}
OF_A_SOFTMAX = [name for name, criterion in CRITERIA.items() if not criterion.multi_label]
every_criterion = pytest.mark.parametrize("criterion", OF_A_SOFTMAX)
# All criteria for the first network and all networks with the first criterion; the others are slow.
every_chain_and_criterion = pytest.mark.parametrize(
    ("name", "criterion"),
    [
        pytest.param(name, criterion, marks=[pytest.mark.slow] if row and column else [])
        for row, name in enumerate(CHAINS)
        for column, criterion in enumerate(OF_A_SOFTMAX)
    ],
)


def create(name="test_resnet", kwargs=None, **config):
    config |= {"backbone_kwargs": kwargs or {}, "num_labels": 5}
    return build_copy(MultiExitForImageClassification, name, **config).eval()


def unlike_images(count=12):
    return torch.randn(count, 3, 32, 32) * torch.linspace(0.2, 3, count).view(-1, 1, 1, 1)


def spread_policy(exit_logits, criterion="confidence"):
    """Return a policy by which images exit at every exit: the more confident half of those that remain."""
    thresholds, history, stay = [], None, torch.ones(len(exit_logits[0]), dtype=torch.bool)
    open_policy = ExitPolicy(criterion=criterion, thresholds=[0.0] * (len(exit_logits) - 1))
    for exit, logits in enumerate(exit_logits[:-1]):
        scores, _, history = open_policy.score(exit, logits, history)
        surest = scores[stay].sort(descending=True).values
        middle = max(1, len(surest) // 2)
        thresholds.append(float(surest[middle - 1 : middle + 1].mean()) if len(surest) else 2.0)
        stay &= scores < thresholds[-1]
    return ExitPolicy(criterion=criterion, thresholds=thresholds)


@torch.no_grad()
def all_exits(model, images):
    return model(images, output_hidden_states=True).exit_logits


# Early exit


@every_chain_and_criterion
def test_early_exit_equals_running_all_exits_and_choosing(name, criterion):
    model, images = create(name, CHAINS[name]), unlike_images()
    exit_logits = all_exits(model, images)
    policy = spread_policy(exit_logits, criterion)
    exit_index, logits = policy.decide(exit_logits)
    if criterion != "patience":
        assert len(set(exit_index.tolist())) == model.num_exits  # images exit at every exit
    confidence = torch.stack([policy.score(exit, logits)[1] for exit, logits in enumerate(exit_logits)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model.early_exit(images, policy)
    assert isinstance(output, EarlyExitOutput)
    assert torch.equal(output.exit_index, exit_index)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.confidence, confidence[exit_index, torch.arange(12)], atol=1e-5, rtol=1e-5)
    for row in (0, 7, 11):
        single = model.early_exit(images[row : row + 1], policy)
        assert single.exit_index.tolist() == [exit_index[row]]
        torch.testing.assert_close(single.logits[0], logits[row], atol=1e-5, rtol=1e-5)


def thresholds_per_image(policy, count=12):
    """Return the policy's thresholds, those by which all and no images exit, and others, in turn."""
    kinds = torch.tensor([policy.thresholds, [0.0, 1e9, 1e9], [math.inf] * 3, [1e9, 1e9, 0.0]])
    return kinds.repeat(count // 4, 1)


@pytest.mark.parametrize("criterion", ["confidence", "patience"])
def test_every_image_may_have_its_own_thresholds(criterion):
    model, images = create(), unlike_images()
    exit_logits = all_exits(model, images)
    policy = spread_policy(exit_logits, criterion)
    thresholds = thresholds_per_image(policy)
    output = model.early_exit(images, policy, thresholds)
    assert output.exit_index[1::4].tolist() == [0] * 3 and output.exit_index[2::4].tolist() == [3] * 3
    assert output.exit_index[3::4].tolist() == [2] * 3
    alone = [
        model.early_exit(images[[row]], replace(policy, thresholds=thresholds[row].clamp(max=1e9).tolist()))
        for row in range(12)
    ]
    assert output.exit_index.tolist() == [int(single.exit_index) for single in alone]
    torch.testing.assert_close(output.logits, torch.cat([single.logits for single in alone]), atol=1e-5, rtol=1e-5)
    exit_index, logits = policy.decide(exit_logits, thresholds)
    assert torch.equal(output.exit_index, exit_index)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    same = model.early_exit(images, policy, torch.tensor(policy.thresholds).expand(12, 3))
    assert torch.equal(same.logits, model.early_exit(images, policy).logits)


def test_thresholds_and_target_cost_contradict_each_other():
    with pytest.raises(ValueError, match="thresholds and target_cost both decide when images exit. Give one of them."):
        create().early_exit(unlike_images(), ExitPolicy(thresholds=[0.5] * 3), torch.zeros(12, 3), target_cost=0.5)


def test_thresholds_per_image_where_the_batch_cannot_shrink():
    model, images = parallel_paths(), unlike_images()
    exit_logits = all_exits(model, images)
    policy = spread_policy(exit_logits)
    thresholds = torch.tensor(policy.thresholds) * torch.linspace(0.5, 1.5, 12).unsqueeze(1)
    with pytest.warns(UserWarning, match="cannot continue with part of a batch"):
        output = model.early_exit(images, policy, thresholds)
    assert torch.equal(output.exit_index, policy.decide(exit_logits, thresholds)[0])
    assert not torch.equal(output.exit_index, policy.decide(exit_logits)[0])


@pytest.mark.parametrize(
    ("thresholds", "words"),
    [
        (torch.zeros(12), r"thresholds must be shaped .images, auxiliary exits., .12, 3., but got .12,."),
        (torch.zeros(12, 4), "but got .12, 4."),
        (torch.full((12, 3), -1.0), "thresholds must be at least 0, but the least is -1"),
        (torch.full((12, 3), math.nan), "the least is nan"),
    ],
)
def test_bad_thresholds_of_images(thresholds, words):
    with pytest.raises(ValueError, match=words):
        create().early_exit(unlike_images(), ExitPolicy(thresholds=[0.5] * 3), thresholds)


def test_rows_keep_the_order_of_the_input():
    model, images = create(), unlike_images()
    policy = spread_policy(all_exits(model, images))
    order = torch.randperm(12)
    output, shuffled = model.early_exit(images, policy), model.early_exit(images[order], policy)
    assert torch.equal(shuffled.exit_index, output.exit_index[order])
    torch.testing.assert_close(shuffled.logits, output.logits[order], atol=1e-5, rtol=1e-5)


def test_the_rest_of_the_network_sees_the_undecided_images_alone():
    model, images = create(), unlike_images()
    policy = spread_policy(all_exits(model, images))
    exit_index = policy.decide(all_exits(model, images))[0]
    model.early_exit(images, policy)  # with the rehearsal
    rows = {}
    for stage in (2, 3, 4):
        stage_module = model.backbone.get_submodule(model.anatomy.stages[stage].module)
        stage_module.register_forward_hook(
            lambda module, args, output, stage=stage: rows.setdefault(stage, []).append(len(args[0]))
        )
    model.early_exit(images, policy)
    assert rows == {stage: [int((exit_index >= stage - 1).sum())] for stage in (2, 3, 4)}
    rows.clear()
    model.early_exit(images, ExitPolicy(thresholds=[0.0, 0.0, 0.0]))
    assert rows == {}  # all images exited at the first exit
    assert len(model(images).logits) == len(images) and rows  # the next call sees a plain network


def test_a_batch_runs_in_parts_up_to_the_first_exit_and_together_behind_it():
    model, images = create(), unlike_images(2 * CPU_IMAGES_PER_THREAD * torch.get_num_threads() + 1)
    model.early_exit(images, ExitPolicy(thresholds=[2.0, 0.5, 2.0]))  # with the rehearsal
    rows = {0: [], 1: [], 2: [], 3: []}
    for stage, seen in rows.items():
        model.backbone.get_submodule(model.anatomy.stages[stage].module).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(len(args[0]))
        )
    part = len(images) // 2
    # No image can exit at exit 0, so the first head that runs is that of exit 1, at the end of stage 2.
    model.early_exit(images, ExitPolicy(thresholds=[2.0, 0.99, 2.0]))
    assert rows[1] == rows[2] == [part, part, 1] and rows[3] == [len(images)]
    for seen in rows.values():
        seen.clear()
    model.early_exit(images, ExitPolicy(thresholds=[2.0, 2.0, 2.0]))
    assert rows[0] == rows[3] == [len(images)]  # with no exit to ask there is nothing to wait at


def test_heads_at_which_no_image_can_exit_are_not_computed():
    model, images = create(), unlike_images()
    calls = []
    for exit, head in enumerate(model.exits):
        head.register_forward_hook(lambda module, args, output, exit=exit: calls.append(exit))
    model.early_exit(images[:1], ExitPolicy(thresholds=[2.0, 1.0, 2.0]))
    assert calls == [1]
    calls.clear()
    model.early_exit(images[:1], ExitPolicy(criterion="patience", thresholds=[3, 1, 3]))
    assert calls == [0, 1]  # whether the second agrees depends on the first


def test_channels_last_stays():
    model, images = create().to(memory_format=torch.channels_last), unlike_images()
    images = images.to(memory_format=torch.channels_last)
    policy = spread_policy(all_exits(model, images))
    formats = []
    model.backbone.layer4.register_forward_pre_hook(
        lambda module, args: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    model.early_exit(images, policy)
    assert formats == [True] * len(formats) and formats


def test_under_inference_mode_and_autocast():
    model, images = create(), unlike_images()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        exit_logits = [logits.float() for logits in all_exits(model, images)]
        policy = spread_policy(exit_logits)
        output = model.early_exit(images, policy)
    exit_index, logits = policy.decide(exit_logits)
    assert torch.equal(output.exit_index, exit_index)
    torch.testing.assert_close(output.logits.float(), logits, atol=0.02, rtol=0.02)
    assert output.confidence.dtype == torch.float32


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_images_of_another_dtype_under_autocast(weights):
    model = create().to(weights)
    images = unlike_images().to(torch.float32 if weights is torch.bfloat16 else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        exit_logits = [logits.float() for logits in all_exits(model, images)]
        policy = spread_policy(exit_logits)
        output = model.early_exit(images, policy)
    assert model.shrinks_batch is True
    exit_index, logits = policy.decide(exit_logits)
    assert (output.exit_index == exit_index).float().mean() > 0.8  # a score may round across its threshold
    same = output.exit_index == exit_index
    torch.testing.assert_close(output.logits[same].float(), logits[same], atol=0.05, rtol=0.05)


def test_in_bfloat16():
    model, images = create().to(torch.bfloat16), unlike_images().to(torch.bfloat16)
    policy = spread_policy(all_exits(model, images))
    output = model.early_exit(images, policy)
    assert model.shrinks_batch is True  # rounding is not mistaken for a change of the outputs
    assert output.logits.dtype == torch.bfloat16 and output.logits.isfinite().all()


def test_an_empty_batch():
    output = create().early_exit(torch.empty(0, 3, 32, 32), ExitPolicy(thresholds=[0.5, 0.5, 0.5]))
    assert output.logits.shape == (0, 5) and output.exit_index.shape == (0,)


def test_a_model_without_auxiliary_exits():
    model, images = create(exits=[]), unlike_images(3)
    output = model.early_exit(images, ExitPolicy(thresholds=[]))
    assert torch.equal(output.logits, all_exits(model, images)[0]) and output.exit_index.tolist() == [0, 0, 0]


def test_the_global_seed_is_left_alone():
    model, images = create(), unlike_images()
    state = torch.get_rng_state()
    model.early_exit(images, ExitPolicy(thresholds=[0.5, 0.5, 0.5]))
    assert torch.equal(torch.get_rng_state(), state)


# Networks that cannot shrink


class BatchNormOfTheBatch(nn.BatchNorm2d):
    """Normalises by the batch in eval mode too."""

    def forward(self, images):
        return nn.functional.batch_norm(images, None, None, self.weight, self.bias, training=True)


def parallel_paths():
    model, around = create(), []
    model.backbone.layer1.register_forward_pre_hook(lambda module, args: around.append(args[0]))
    model.backbone.layer4.register_forward_hook(
        lambda module, args, output: output + around.pop().mean(dim=(1, 2, 3), keepdim=True)
    )
    return model


def batch_dependent():
    model = create()
    block = model.backbone.layer4[0]
    block.bn1 = BatchNormOfTheBatch(block.bn1.num_features).eval()
    nn.init.ones_(block.bn2.weight)  # timm starts with blocks that add nothing
    return model


def batch_dependent_before_the_first_exit():
    model = create()
    block = model.backbone.layer1[0]
    block.bn1 = BatchNormOfTheBatch(block.bn1.num_features).eval()
    nn.init.ones_(block.bn2.weight)
    return model


def without_hooks():
    backbone = timm.create_model("test_resnet", num_classes=5)
    backbone.feature_info = [info | {"module": "misnamed"} for info in backbone.feature_info]
    model = MultiExitForImageClassification(create().config, backbone=backbone).eval()
    assert not model.anatomy.hooked
    return model


@pytest.mark.parametrize(
    "build_model", [parallel_paths, batch_dependent, batch_dependent_before_the_first_exit, without_hooks]
)
@every_criterion
def test_networks_that_cannot_shrink_answer_as_with_all_exits(build_model, criterion):
    model, images = build_model(), unlike_images()
    exit_logits = all_exits(model, images)
    policy = spread_policy(exit_logits, criterion)
    with pytest.warns(UserWarning, match="This network cannot continue with part of a batch .*. Each batch runs"):
        output = model.early_exit(images, policy)
    exit_index, logits = policy.decide(exit_logits)
    assert torch.equal(output.exit_index, exit_index)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        model.early_exit(images, policy)


def test_a_whole_batch_stops_when_its_last_image_has_decided():
    model, images = parallel_paths(), unlike_images()
    policy = ExitPolicy(thresholds=[0.0] + [2.0] * (model.num_exits - 2))
    with pytest.warns(UserWarning):
        model.early_exit(images, policy)
    calls = []
    model.backbone.fc.register_forward_hook(lambda *args: calls.append(1))
    model.early_exit(images, policy)
    assert calls == []


def test_the_verdict_is_forgotten_when_weights_may_change():
    model = create()
    model.early_exit(unlike_images(), ExitPolicy(thresholds=[0.5, 0.5, 0.5]))
    assert model.shrinks_batch is True
    model.train()
    assert model.shrinks_batch is None


def test_one_image_needs_no_rehearsal():
    model = parallel_paths()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.early_exit(unlike_images(1), ExitPolicy(thresholds=[0.0] * (model.num_exits - 1)))
    assert model.shrinks_batch is None


# Where a model lives


def test_threads_never_see_each_others_rows():
    model, images = create(), torch.stack([unlike_images(), unlike_images()])
    policy = spread_policy(all_exits(model, images[0]))
    expected = [model.early_exit(half, policy) for half in images]
    wrong = []

    def work(half):
        for _ in range(30):
            output = model.early_exit(images[half], policy)
            if not torch.equal(output.logits, expected[half].logits):
                wrong.append(half)

    threads = [threading.Thread(target=work, args=(half,)) for half in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_leave_early_alike():
    model, images = create(), unlike_images()
    policy = spread_policy(all_exits(model, images))
    expected = model.early_exit(images, policy)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = other.early_exit(images, policy)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.exit_index, expected.exit_index)


def leave_early_elsewhere(model, images, policy):
    torch.set_num_threads(1)
    output = model.early_exit(images, policy)
    return output.logits.numpy(), output.exit_index.numpy()


@pytest.mark.slow
def test_in_another_process():
    model, images = create(), unlike_images()
    policy = spread_policy(all_exits(model, images))
    expected = model.early_exit(images, policy)
    with forkserver().Pool(1) as pool:
        logits, exit_index = pool.apply(leave_early_elsewhere, (model, images, policy))
    assert torch.equal(torch.from_numpy(exit_index), expected.exit_index)
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits)


@pytest.mark.parametrize("in_forward", [False, True])
def test_a_compiled_model_leaves_early(in_forward):
    model, images = create(), unlike_images()
    policy = spread_policy(all_exits(model, images))
    expected = model.early_exit(images, policy)
    if in_forward:
        model.config.exit_policy, model.config.early_exit = policy.to_dict(), True
    compiled = torch.compile(model, backend="eager")
    output = compiled(images) if in_forward else compiled.early_exit(images, policy)
    assert torch.equal(output.exit_index, expected.exit_index)
    torch.testing.assert_close(output.logits, expected.logits)


@pytest.mark.slow
def test_a_compiled_backbone_leaves_early():
    model, images = create(), unlike_images()
    policy = spread_policy(all_exits(model, images))
    expected = model.early_exit(images, policy)
    model.backbone.compile(backend="eager")
    assert torch.equal(model.early_exit(images, policy).exit_index, expected.exit_index)


# In a checkpoint


def test_a_policy_lives_in_the_checkpoint(tmp_path):
    model, images = create(), unlike_images()
    exit_logits = all_exits(model, images)
    policy = spread_policy(exit_logits)
    model.config.exit_policy = policy.to_dict()
    model.config.early_exit = True
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    output = loaded(images)
    assert isinstance(output, EarlyExitOutput)
    assert torch.equal(output.exit_index, policy.decide(exit_logits)[0])
    assert torch.equal(loaded(images, return_dict=False)[1], output.exit_index)
    labels = torch.zeros(12, dtype=torch.long)
    for every_exit in (loaded(images, labels=labels), loaded(images, output_hidden_states=True)):
        assert isinstance(every_exit, MultiExitOutput) and len(every_exit.exit_logits) == 4
    assert isinstance(loaded.train()(images), MultiExitOutput)


def test_in_a_pipeline(tmp_path):
    model = create(id2label={index: f"class {index}" for index in range(5)})
    model.config.exit_policy = ExitPolicy(thresholds=[2.0, 0.0, 2.0]).to_dict()
    model.config.early_exit = True
    model.config.pretrained_cfg["input_size"] = [3, 32, 32]
    model.save_pretrained(tmp_path)
    images = [Image.effect_noise((40, 40), spread).convert("RGB") for spread in (10, 100, 200)]
    plain = pipeline("image-classification", model=str(tmp_path))
    keeps = pipeline("image-classification", model=str(tmp_path), pipeline_class=EarlyExitPipeline)
    for options in ({}, {"batch_size": 2}):
        predictions, expected = keeps(images, top_k=2, **options), plain(images, top_k=2, **options)
        assert [[prediction.pop("exit_index") for prediction in image] for image in predictions] == [[1, 1]] * 3
        assert predictions == expected
    keeps.model.config.early_exit = False
    assert {prediction["exit_index"] for prediction in keeps(images[0])} == {3}


def test_a_pipeline_takes_policy_and_target_cost_per_call(tmp_path):
    model = create()
    frontier = {"costs": [0.25, 0.5, 0.75, 1.0], "thresholds": [[0.0, 2, 2], [2, 0.0, 2], [2.0, 2, 2]]}
    frontier |= {"exit_counts": [[9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 0, 9]], "correct": [5, 6, 7]}
    policy = ExitPolicy(thresholds=[2.0, 2.0, 2.0], calibration={"frontier": frontier})
    model.config.exit_policy, model.config.pretrained_cfg["input_size"] = policy.to_dict(), [3, 32, 32]
    model.save_pretrained(tmp_path)
    images = [Image.effect_noise((40, 40), spread).convert("RGB") for spread in (10, 100, 200)]
    classify = pipeline("image-classification", model=str(tmp_path), pipeline_class=EarlyExitPipeline)

    def exits(**options):
        return [image[0]["exit_index"] for image in classify(images, top_k=1, **options)]

    third = ExitPolicy(thresholds=[2.0, 2.0, 0.0])
    assert exits() == [3] * 3  # early exit is not enabled in the checkpoint
    assert exits(target_cost=0.3) == [0] * 3 and exits(target_cost=0.6) == [1] * 3
    assert exits(policy=third) == [2] * 3 and exits(policy=third, batch_size=2) == [2] * 3
    assert exits() == [3] * 3
    expected = model.early_exit(classify.image_processor(images, return_tensors="pt")["pixel_values"], policy.at(0.6))
    scores = [image[0]["score"] for image in classify(images, top_k=1, target_cost=0.6)]
    assert scores == pytest.approx(expected.logits.softmax(dim=1).amax(dim=1).tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="The policy has no frontier"):
        exits(policy=third, target_cost=0.6)
    always = pipeline(
        "image-classification",
        model=model,
        image_processor=classify.image_processor,
        target_cost=0.3,
        pipeline_class=EarlyExitPipeline,
    )
    assert always(images[0])[0]["exit_index"] == 0 and always(images[0], policy=policy)[0]["exit_index"] == 0


def test_evaluation_sees_all_exits(train):
    model = create(small_input_stem=True)
    model.config.exit_policy = ExitPolicy(thresholds=[0.0, 0.0, 0.0]).to_dict()
    model.config.early_exit = True
    metrics = train(model).evaluate()
    assert {f"eval_exit_{exit}_accuracy" for exit in range(4)} <= metrics.keys()


# Errors


def test_errors_name_what_is_wrong():
    model, images = create(), unlike_images(2)
    with pytest.raises(ValueError) as error:
        model.early_exit(images)
    assert str(error.value) == (
        "early_exit needs a policy, but none was given and config.exit_policy is None. "
        "Set model.config.exit_policy = calibrate(...).to_dict()."
    )
    with pytest.raises(ValueError, match="The policy is for 3 exits, but there are 4. Calibrate it on logits of this"):
        model.early_exit(images, ExitPolicy(thresholds=[0.5, 0.5]))
    with pytest.raises(ValueError, match="The policy is for 2 exits, but there are 3."):
        ExitPolicy(thresholds=[0.5]).decide(torch.randn(3, 2, 5))
    with pytest.raises(ValueError, match="in eval mode, but it is in training mode. Call model.eval()"):
        model.train().early_exit(images, ExitPolicy(thresholds=[0.5] * 3))


def test_stages_that_end_out_of_order_compute_all_exits():
    model = MultiExitForImageClassification.from_backbone("crossvit_tiny_240", num_labels=5, exits=[0, 1, 3]).eval()
    images = torch.randn(4, 3, 240, 240)
    with torch.no_grad():
        exit_logits = model(images).exit_logits
    anyone = ExitPolicy(thresholds=[0.0] * 3)
    middle = [anyone.score(exit, exit_logits[exit])[0].median().item() for exit in range(3)]
    policy = ExitPolicy(thresholds=middle)
    exit_index, logits = policy.decide(exit_logits)
    with pytest.warns(UserWarning, match="do not end in order, so early_exit computes all exits"):
        output = model.early_exit(images, policy)
    assert torch.equal(output.exit_index, exit_index)
    assert torch.equal(output.logits, logits)
    torch.testing.assert_close(output.confidence, logits.softmax(dim=1).amax(dim=1))
