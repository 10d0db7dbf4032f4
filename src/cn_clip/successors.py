"""Replacements of official modules that this package does not have."""

from __future__ import annotations

_SUCCESSORS = {
    "cn_clip.clip.modeling_bert": "model.bert of cn_clip.clip.create_model",
    "cn_clip.clip.configuration_bert": "model.config of cn_clip.clip.create_model",
    "cn_clip.training.train": "the command cn-clip train",
    "cn_clip.training.data": "the command cn-clip train",
    "cn_clip.training.params": "the command cn-clip train",
    "cn_clip.training.logger": "the command cn-clip train",
    "cn_clip.training.scheduler": "the command cn-clip train",
    "cn_clip.preprocess.transform_openai_pretrain_weights": (
        "cn_clip.clip.load or --clip-weight-path, which read OpenAI's file as it is"
    ),
    "cn_clip.deploy.onnx_to_tensorrt": "the command cn-clip export --to tensorrt",
    "cn_clip.deploy.tensorrt_utils": "the command cn-clip export --to tensorrt",
    "cn_clip.deploy.pytorch_to_coreml": "the command cn-clip export --to coreml",
    "cn_clip.deploy.speed_benchmark": "the command cn-clip bench",
    "cn_clip.deploy.benchmark_utils": "the command cn-clip bench",
    "cn_clip.eval.data": "the commands cn-clip eval and cn-clip embed",
    "cn_clip.eval.extract_features_onnx": "the command cn-clip embed --model EXPORT",
    "cn_clip.eval.extract_features_tensorrt": "the command cn-clip embed",
    "cn_clip.eval.cvinw_zeroshot_templates": "cn_clip.eval.zeroshot.read_templates",
    "cn_clip.eval.imagenet_zeroshot_templates": "cn_clip.eval.zeroshot.read_templates",
}


class Successors:
    """A last import finder whose error names the replacement of an official module."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in _SUCCESSORS:
            raise ModuleNotFoundError(
                f"{name} of the official package is gone; use {_SUCCESSORS[name]}", name=name
            )
