"""Sound: Stable Audio, AudioLDM, AudioLDM 2 and Dance Diffusion. Fractions of a second."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AudioLDMPipeline,
    AutoencoderKL,
    AutoencoderOobleck,
    DanceDiffusionPipeline,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    IPNDMScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    UNet1DModel,
    UNet2DConditionModel,
)
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from family_models.family import Family
from family_models.folder import save
from family_models.text import WIDTH, byte_pairs, t5_encoder, t5_tokenizer
from family_models.weights import seeded

MELS = 32
"""Bands of a spectrogram: 8 latents."""
SPECTROGRAM = 0.32
"""Seconds: 32 frames of 10 ms, 8 latents."""


def write_stable_audio(folder: Path) -> None:
    """``stabilityai/stable-audio-open-1.0``: latents over time alone, fewer heads of keys than of queries."""
    transformer = seeded(
        lambda: StableAudioDiTModel(
            sample_size=16,
            in_channels=64,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            cross_attention_dim=WIDTH,
            time_proj_dim=32,
            global_states_input_dim=2 * WIDTH,
            cross_attention_input_dim=WIDTH,
        )
    )
    autoencoder = seeded(
        lambda: AutoencoderOobleck(encoder_hidden_size=8, channel_multiples=[1, 1, 1, 1, 1], decoder_channels=8),
        seed=20,
    )
    pipeline = StableAudioPipeline(
        vae=autoencoder,
        text_encoder=t5_encoder(),
        projection_model=seeded(
            lambda: StableAudioProjectionModel(
                text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=512
            ),
            seed=21,
        ),
        tokenizer=t5_tokenizer(128),
        transformer=transformer,
        scheduler=EDMDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
        ),
    )
    save(pipeline, folder)


def mel_autoencoder() -> AutoencoderKL:
    """Of spectrograms: one channel in, 8 channels of latents, four bands and frames to one."""
    return seeded(
        lambda: AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=8,
            norm_num_groups=4,
            sample_size=MELS,
            scaling_factor=0.9227914214134216,
        ),
        seed=20,
    )


def vocoder() -> SpeechT5HifiGan:
    """HiFi-GAN: [rows, frames, MELS] to [rows, 160 frames] at 16 kHz."""
    config = SpeechT5HifiGanConfig(
        model_in_dim=MELS,
        sampling_rate=16000,
        upsample_initial_channel=64,
        upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )
    return seeded(lambda: SpeechT5HifiGan(config), seed=21)


SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
TOKENS, MERGES = byte_pairs(())
VOCABULARY = {token: index for index, token in enumerate([*SPECIALS, *TOKENS, "<mask>"])}


def roberta_tokenizer() -> RobertaTokenizer:
    """RoBERTa's byte pairs."""
    return RobertaTokenizer(dict(VOCABULARY), list(MERGES), model_max_length=77)


def clap_text() -> ClapTextConfig:
    """CLAP's encoder of text, a RoBERTa."""
    return ClapTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=100,
        projection_dim=WIDTH,
        pad_token_id=VOCABULARY["<pad>"],
        bos_token_id=VOCABULARY["<s>"],
        eos_token_id=VOCABULARY["</s>"],
    )


def clap() -> ClapModel:
    """CLAP with both encoders; that of sound ranks several waveforms of one prompt."""
    sound = ClapAudioConfig(
        spec_size=64,
        window_size=4,
        num_mel_bins=64,
        patch_embeds_hidden_size=16,
        hidden_size=32,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        projection_dim=WIDTH,
        enable_fusion=False,
        num_classes=4,
        patch_embed_input_channels=1,
    )
    config = ClapConfig(text_config=clap_text().to_dict(), audio_config=sound.to_dict(), projection_dim=WIDTH)
    return seeded(lambda: ClapModel(config), seed=10)


MEL_STEPS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}


def mel_unet() -> UNet2DConditionModel:
    """A U-Net over spectrograms whose only condition is one embedding, concatenated with that of the time."""
    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            cross_attention_dim=(32, 64),
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=WIDTH,
            class_embeddings_concat=True,
        )
    )


def write_audioldm(folder: Path) -> None:
    """``cvssp/audioldm-s-full-v2``: cross-attention without a text, which is attention to itself."""
    pipeline = AudioLDMPipeline(
        vae=mel_autoencoder(),
        text_encoder=seeded(lambda: ClapTextModelWithProjection(clap_text()), seed=10),
        tokenizer=roberta_tokenizer(),
        unet=mel_unet(),
        scheduler=DDIMScheduler(**MEL_STEPS, steps_offset=1, set_alpha_to_one=False),
        vocoder=vocoder(),
    )
    save(pipeline, folder)


def write_audioldm2(folder: Path) -> None:
    """``cvssp/audioldm2``: a GPT-2 writes eight embeddings, which the U-Net reads beside those of a T5."""
    unet = seeded(
        lambda: AudioLDM2UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            cross_attention_dim=((None, WIDTH, WIDTH), (None, WIDTH, WIDTH)),
        )
    )
    language = GPT2Config(
        vocab_size=8, n_positions=256, n_embd=WIDTH, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    language.max_new_tokens = 8
    pipeline = AudioLDM2Pipeline(
        vae=mel_autoencoder(),
        text_encoder=clap(),
        text_encoder_2=t5_encoder(),
        projection_model=seeded(
            lambda: AudioLDM2ProjectionModel(
                text_encoder_dim=WIDTH, text_encoder_1_dim=WIDTH, langauge_model_dim=WIDTH
            ),
            seed=22,
        ),
        language_model=seeded(lambda: GPT2LMHeadModel(language), seed=23),
        tokenizer=roberta_tokenizer(),
        tokenizer_2=t5_tokenizer(512),
        feature_extractor=ClapFeatureExtractor(feature_size=64),
        unet=unet,
        scheduler=DDIMScheduler(**MEL_STEPS, steps_offset=1, set_alpha_to_one=False),
        vocoder=vocoder(),
    )
    save(pipeline, folder)


def write_dance(folder: Path) -> None:
    """``harmonai/maestro-150k``: waveforms of two channels, and times in 0..1 as Fourier features."""
    unet = seeded(
        lambda: UNet1DModel(
            sample_size=64,
            sample_rate=16000,
            in_channels=2,
            out_channels=2,
            extra_in_channels=16,
            time_embedding_type="fourier",
            time_embedding_dim=16,
            flip_sin_to_cos=True,
            use_timestep_embedding=False,
            freq_shift=0.0,
            down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
            up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
            block_out_channels=(32, 32, 64),
        )
    )
    save(DanceDiffusionPipeline(unet=unet, scheduler=IPNDMScheduler()), folder)


FAMILIES: Sequence[Family] = (
    Family(
        "stable-audio",
        "Stable Audio Open",
        write_stable_audio,
        call={"audio_end_in_s": 0.5},
        note="the published scheduler, CosineDPMSolverMultistep, draws its noise by torchsde; here it is EDM's",
    ),
    Family("audioldm", "AudioLDM", write_audioldm, call={"audio_length_in_s": SPECTROGRAM}),
    Family("audioldm2", "AudioLDM 2", write_audioldm2, call={"audio_length_in_s": SPECTROGRAM}),
    Family("dance-diffusion", "Dance Diffusion", write_dance, note="no prompt, waveforms"),
)
