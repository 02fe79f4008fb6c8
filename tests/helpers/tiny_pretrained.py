"""Folders of the real pretrained classes at a tiny size with random weights, in their published layout."""

import json
from pathlib import Path

import pytest
import torch


def save_wan(folder: Path, version: str = "2.2", seed: int = 0) -> Path:
    """Save a Wan autoencoder: 2.1 with its published statistics, 2.2 with patches and other statistics."""
    kl = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan", reason="needs diffusers")
    torch.manual_seed(seed)
    if version == "2.1":
        model = kl.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
    else:
        model = kl.AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=48,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.01 * i for i in range(48)],
            latents_std=[1 + 0.02 * i for i in range(48)],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        )
    model.save_pretrained(folder)
    return folder


def save_oobleck(folder: Path, seed: int = 0, ratios: tuple[int, ...] = (2, 4, 4, 8, 8), rate: int = 44100) -> Path:
    """Save a Stable Audio autoencoder with its published strides and clock, and 8 channels instead of 64."""
    kl = pytest.importorskip("diffusers.models.autoencoders.autoencoder_oobleck", reason="needs diffusers")
    torch.manual_seed(seed)
    model = kl.AutoencoderOobleck(
        encoder_hidden_size=16,  # twice the latent channels: mean and spread
        downsampling_ratios=list(ratios),
        channel_multiples=[1] * len(ratios),
        decoder_channels=2,
        decoder_input_channels=8,
        sampling_rate=rate,
    )
    model.save_pretrained(folder)
    return folder


def save_t5(folder: Path, kind: str = "umt5", seed: int = 0) -> Path:
    """Save an encoder of width 16 in ``text_encoder/`` and its tokenizer in ``tokenizer/``."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(seed)
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(f"{mark}{c}" for mark in ("", "\u2581") for c in "abdeghilnorstuw")]
    vocabulary = [(piece, 0.0 if piece.startswith("<") else -2.0 - 0.01 * i) for i, piece in enumerate(pieces)]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer")
    names = {"umt5": ("UMT5Config", "UMT5EncoderModel"), "t5": ("T5Config", "T5EncoderModel")}[kind]
    config = getattr(transformers, names[0])(
        vocab_size=len(pieces), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4
    )
    getattr(transformers, names[1])(config).save_pretrained(folder / "text_encoder")
    return folder


def save_whisper(folder: Path, exact: bool = True, seed: int = 0) -> Path:
    """Save a Whisper of width 16 that transcribes any sound; ``exact``: with alignment heads, as published."""
    whisper = pytest.importorskip("transformers", reason="needs transformers")
    letters = [chr(c) for c in range(33, 127)] + ["\u0120"]
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    vocabulary = {token: i for i, token in enumerate(letters + special)}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    whisper.WhisperTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    whisper.WhisperFeatureExtractor().save_pretrained(folder)
    end, start = vocabulary["<|endoftext|>"], vocabulary["<|startoftranscript|>"]
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 16))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    torch.manual_seed(seed)
    timestamps = 1501  # behind the last special token, 20 ms apart
    config = whisper.WhisperConfig(
        vocab_size=len(vocabulary) + timestamps, d_model=16, max_target_positions=24, **sizes, **heads, **ends
    )
    network = whisper.WhisperForConditionalGeneration(config)
    network.generation_config._from_model_config = False  # use these settings after loading
    network.generation_config.max_length = 12
    network.generation_config.suppress_tokens = [*range(end, end + len(special))]
    network.generation_config.begin_suppress_tokens = None
    network.generation_config.no_timestamps_token_id = vocabulary["<|notimestamps|>"]
    if exact:
        network.generation_config.alignment_heads = [[0, 0], [0, 1]]
    network.save_pretrained(folder)
    return folder


def save_llava(folder: Path, seed: int = 0) -> Path:
    """Save a LLaVA of width 16 that takes pictures of 32 pixels and writes characters."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(chr(c) for c in range(33, 127)), "\u0120"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    characters = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    characters.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8, projection_dim=16)
    text = transformers.LlamaConfig(**sizes, vocab_size=len(pieces), num_hidden_layers=1, num_key_value_heads=2)
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=16)
    )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    return folder
