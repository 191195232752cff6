"""Models of which it is known whether their loops repeat an operation: what the stage test is tried on.

    made = codec("ABAB")                                      # runs this sequence, with shared weights
    gated_copy(deep_twin)                                     # a looped block that computes what the deep twin computes
    unrolled_copy(loop_model)                                 # an unlooped model that iterates
"""

from studies.questions.controls.codec import Codec, CodecConfig, CodecFailed, TrainedCodec, codec
from studies.questions.controls.codec_files import bundled_codecs, load_codec, save_codec
from studies.questions.controls.counter import counter
from studies.questions.controls.far import far_loops
from studies.questions.controls.gated import gated_copy
from studies.questions.controls.operations import OPERATIONS, Operation, mixture
from studies.questions.controls.per_loop import per_loop_attention, per_loop_mlp
from studies.questions.controls.retraining import retrained, task_batches
from studies.questions.controls.unrolled import unrolled_copy
from studies.questions.controls.untrained import SHAPES, untrained

__all__ = ["OPERATIONS", "SHAPES", "Codec", "CodecConfig", "CodecFailed", "Operation", "TrainedCodec",
           "bundled_codecs", "codec", "counter", "far_loops", "gated_copy", "load_codec", "mixture",
           "per_loop_attention", "per_loop_mlp", "retrained", "save_codec", "task_batches", "unrolled_copy",
           "untrained"]
