"""Replacements of official modules that this package does not have."""

from __future__ import annotations

_SUCCESSORS = {
    "cn_clip.clip.model": "cn_clip.clip.create_model, and for files the command cn-clip convert",
    "cn_clip.clip.modeling_bert": "model.bert of cn_clip.clip.create_model",
    "cn_clip.clip.configuration_bert": "model.config of cn_clip.clip.create_model",
    "cn_clip.clip.bert_tokenizer": "cn_clip.clip.tokenize, or cn_clip.clip._tokenizer",
    "cn_clip.training": "the command cn-clip train",
    "cn_clip.deploy": "torch.onnx.export of a model from cn_clip.clip.load_from_name",
    "cn_clip.preprocess": "the command cn-clip data, and cn_clip.clip.load for OpenAI's weights",
    "cn_clip.eval.data": "the commands cn-clip eval and cn-clip embed",
    "cn_clip.eval.extract_features": "the command cn-clip embed",
    "cn_clip.eval.extract_features_onnx": "the command cn-clip embed",
    "cn_clip.eval.extract_features_tensorrt": "the command cn-clip embed",
    "cn_clip.eval.make_topk_predictions": "the command cn-clip eval predictions",
    "cn_clip.eval.make_topk_predictions_tr": "the command cn-clip eval predictions",
    "cn_clip.eval.evaluation": "the command cn-clip eval retrieval",
    "cn_clip.eval.evaluation_tr": "the command cn-clip eval retrieval",
    "cn_clip.eval.transform_ir_annotation_to_tr": "the command cn-clip eval retrieval",
    "cn_clip.eval.zeroshot_evaluation": "the command cn-clip eval zeroshot",
    "cn_clip.eval.cvinw_zeroshot_templates": "the command cn-clip eval zeroshot",
    "cn_clip.eval.imagenet_zeroshot_templates": "the command cn-clip eval zeroshot",
}


class Successors:
    """A last import finder whose error names the replacement of an official module."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in _SUCCESSORS:
            raise ModuleNotFoundError(
                f"{name} of the official package is gone; use {_SUCCESSORS[name]}", name=name
            )
