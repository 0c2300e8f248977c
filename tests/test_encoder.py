"""Traces of teacher and students against plain transformers, and the proof that no L x L tensor is made."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AlbertConfig, AutoModel, AutoModelForMaskedLM, BertConfig, BertModel, DebertaV2Config, DistilBertConfig,
                          ElectraConfig, ModernBertConfig, MPNetConfig, RobertaConfig, XLMRobertaConfig)

from pretrain.encoder import ATTENTION, TEACHERS, check_tokenizer, load_teacher, trace
from pretrain.objective import TERMS, distil, weighted
from shards.block import read_manifest

VOCABULARY = 61


def bert(heads: int = 4, dropout: float = 0.0, implementation: str = ATTENTION, seed: int = 0) -> BertModel:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=heads,
                        intermediate_size=48, max_position_embeddings=160, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=dropout, initializer_range=0.2)
    config._attn_implementation = implementation
    torch.manual_seed(seed)
    return BertModel(config, add_pooling_layer=False)


def batch(rows: int = 3, length: int = 11, padded: bool = True):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=g)
    real = torch.ones(rows, length, dtype=torch.bool)
    if padded:
        real[0, length // 2:] = False
        real[1, length - 2:] = False
    segments = torch.zeros_like(ids)
    segments[:, length // 3:] = 1
    return ids, segments * real, real


def test_a_trace_is_what_eager_attention_computes():
    ids, segments, real = batch()
    model, plain = bert().eval(), bert(implementation="eager").eval()
    got = trace(model, ids, segments, real)
    want = plain(ids, attention_mask=real.long(), token_type_ids=segments, output_hidden_states=True, output_attentions=True)
    for a, b in zip(got.hidden, want.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-5, atol=1e-5)
    for query, key, probabilities in zip(got.queries, got.keys, want.attentions, strict=True):
        scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~real[:, None, None, :], -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), probabilities, rtol=1e-5, atol=1e-6)
    embedded = model.embeddings(input_ids=ids, token_type_ids=segments)
    assert torch.equal(got.hidden[0], embedded)


SMALL = dict(vocab_size=VOCABULARY, num_attention_heads=4, num_hidden_layers=3, hidden_size=32, intermediate_size=48,
             initializer_range=0.2)
SMALL_TEACHERS = [
    BertConfig(**SMALL), RobertaConfig(**SMALL), XLMRobertaConfig(**SMALL), ElectraConfig(**SMALL, embedding_size=16),
    AlbertConfig(**SMALL, embedding_size=16),
    DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_heads=4, n_layers=3, hidden_dim=48, initializer_range=0.2),
    ModernBertConfig(**SMALL, local_attention=16, global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                     cls_token_id=1, sep_token_id=2)]


def eager(kind, config):
    """A random model with eager attention; rows for it, padded, longer than ModernBERT's window; what else it takes."""
    ids, segments, real = batch(length=50)
    ids[~real] = config.pad_token_id
    torch.manual_seed(0)
    extra = {"token_type_ids": segments} if getattr(config, "type_vocab_size", 0) >= 2 else {}
    return kind.from_config(config, attn_implementation="eager").eval(), ids, segments, real, extra


@pytest.mark.parametrize("config", SMALL_TEACHERS, ids=lambda c: c.model_type)
def test_every_teacher_traces_what_eager_attention_computes(config, tmp_path):
    """Loaded as a user loads it."""
    whole, ids, segments, real, extra = eager(AutoModel, config)
    whole.save_pretrained(tmp_path)
    model = load_teacher(str(tmp_path), torch.float32, torch.device("cpu"))
    want = whole(ids, attention_mask=real.long(), output_hidden_states=True, output_attentions=True, **extra)
    got = trace(model, ids, segments, real)
    for a, b in zip(got.hidden, want.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-5)
    layers = zip(got.queries, got.keys, want.attentions, strict=True)
    windowed = [n for n, kind in enumerate(getattr(config, "layer_types", None) or (), 1) if kind == "sliding_attention"]
    for layer, (query, key, probabilities) in enumerate(layers, start=1):
        scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~real[:, None, None, :], -torch.inf)
        if layer in windowed:  # the traces hold every pair; the teacher itself looked at a band of them
            assert (probabilities[1, :, 0, 20:] == 0).all() and (scores.softmax(-1)[1, :, 0, 20:48] > 0).all()
        else:
            torch.testing.assert_close(scores.softmax(-1)[real[:, None].expand(-1, 4, -1)],
                                       probabilities[real[:, None].expand(-1, 4, -1)], rtol=1e-4, atol=1e-6)
    assert (windowed == [2]) == (config.model_type == "modernbert")


@pytest.mark.parametrize("config", SMALL_TEACHERS, ids=lambda c: c.model_type)
def test_every_teachers_head_says_what_its_masked_lm_says(config, tmp_path):
    whole, ids, segments, real, extra = eager(AutoModelForMaskedLM, config)
    whole.save_pretrained(tmp_path / "with")
    whole.base_model.save_pretrained(tmp_path / "without")
    model = load_teacher(str(tmp_path / "with"), torch.float32, torch.device("cpu"), head=True)
    words = torch.tensor([[0, 2, 2], [3, 7, 8]])
    want = whole(ids, attention_mask=real.long(), **extra).logits[words[0], words[1]]
    got = trace(model, ids, segments, real, words)
    torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(got.hidden[-1], trace(model, ids, segments, real).hidden[-1])
    with pytest.raises(ValueError, match="its file lacks .* tensors of a .*MaskedLM of its config.json, such as "):
        load_teacher(str(tmp_path / "without"), torch.float32, torch.device("cpu"), head=True)


def test_there_is_a_small_one_of_every_teacher():
    assert {config.model_type for config in SMALL_TEACHERS} == set(TEACHERS)


def test_published_bin_weights_open_and_run_no_code(tmp_path):
    model = bert().eval()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    teacher = load_teacher(str(tmp_path), torch.float32, torch.device("cpu"))
    assert torch.equal(trace(teacher, *batch()).hidden[-1], trace(model, *batch()).hidden[-1])
    torch.save({**model.state_dict(), "evil": Opener(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="its weights do not open"):
        load_teacher(str(tmp_path), torch.float32, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


class Opener:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("change, says", [
    ({"pad_token_id": 1}, "config.json has pad_token_id=1, the shards pad with 0; write the tokenizer's pad id"),
    ({"vocab_size": 7}, "7 embeddings for a tokenizer of"),
    ({"max_position_embeddings": 47}, "shards: 48 tokens a row, .* reads 47; build them with --row-length 47")],
    ids=str)
def test_a_teacher_is_checked_against_the_shards(change, says, shards_folder, teacher_folder):
    manifest, config = read_manifest(shards_folder), BertConfig.from_pretrained(teacher_folder)
    check_tokenizer(str(teacher_folder), config, manifest)
    with pytest.raises(ValueError, match=says):
        check_tokenizer(str(teacher_folder), BertConfig(**{**config.to_dict(), **change}), manifest)


@pytest.mark.parametrize("config", [MPNetConfig(**SMALL), DebertaV2Config(**SMALL)], ids=lambda c: c.model_type)
def test_a_teacher_that_cannot_be_traced_is_refused_by_name(config, tmp_path):
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is a {config.model_type} model; its attention cannot be traced here"):
        load_teacher(str(tmp_path), torch.float32, torch.device("cpu"))


def test_a_model_whose_attention_cannot_be_traced_is_refused():
    config = MPNetConfig(**SMALL, max_position_embeddings=64)
    config._attn_implementation = ATTENTION
    model = AutoModel.from_config(config)
    with pytest.raises(ValueError, match="MPNetModel: .*cannot be traced"):
        trace(model, *batch())


class Squares(TorchDispatchMode):
    """Remembers every output with two axes that are multiples of L, whatever computes it."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.found = length, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and sum(n and n % self.length == 0 for n in tensor.shape) >= 2:
                self.found.append((str(func), tuple(tensor.shape)))
        return out


PRIME = 127  # larger than every width here and than the vocabulary, so only sequence axes are multiples of it


def step_squares(student_model, *, direct: bool = False, full_mask: bool = False) -> list:
    """Forward of both, loss and backward on padded rows, watched."""
    teacher = bert(seed=1).eval().requires_grad_(False)
    ids, segments, real = batch(length=PRIME)
    with Squares(PRIME) as seen:
        with torch.no_grad():
            t = trace(teacher, ids, segments, real)
        mask = (real[:, None, :, None] & real[:, None, None, :]) if full_mask else real
        s = trace(student_model, ids, segments, mask)
        if direct:
            loss = ((s.queries[0] @ s.keys[0].mT - t.queries[0] @ t.keys[0].mT) ** 2).mean()
        else:
            loss = weighted(distil(s, t, real, [1, 2, 3]), dict.fromkeys(TERMS, 1.0)).mean()
        loss.backward()
    return seen.found


def test_a_training_step_makes_no_l_by_l_tensor():
    assert step_squares(bert().train()) == []
    assert step_squares(bert(dropout=0.1).eval()) == []  # dropout in the config, but off


def test_the_watch_catches_every_way_to_make_one():
    assert step_squares(bert().train(), direct=True)
    assert step_squares(bert().train(), full_mask=True)
    assert step_squares(bert(dropout=0.1).train())


def test_a_teacher_is_loaded_without_dropout_and_gradients(tmp_path):
    bert(dropout=0.5).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), torch.float32, torch.device("cpu"))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    a, b = (trace(teacher, *batch()).hidden[-1] for _ in range(2))
    assert torch.equal(a, b)


def test_a_teacher_whose_file_lacks_layers_is_refused(tmp_path):
    bert().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 5'))
    with pytest.raises(ValueError, match="its file lacks 32 tensors of a BertModel of its config.json, such as encoder.layer.3"):
        load_teacher(str(tmp_path), torch.float32, torch.device("cpu"))


def test_a_cut_weights_file_is_said(tmp_path):
    bert().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="its weights do not open"):
        load_teacher(str(tmp_path), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name, says", [
    ("./nowhere/at/all", "no such folder. Give a folder with config.json"),
])
def test_a_teacher_that_is_not_there_says_what_to_do(name, says):
    with pytest.raises(ValueError, match=says):
        load_teacher(name, torch.float32, torch.device("cpu"))
