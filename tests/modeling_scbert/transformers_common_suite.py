"""
transformers' own common tests of a model, on scBERT's classes; run by test_transformers_common.py.

``upstream`` is the folder of tests of transformers' source distribution, which is fetched and not copied here.
"""

import unittest
import unittest.mock

import torch
from transformers.models.auto import modeling_auto as auto
from upstream.test_configuration_common import ConfigTester
from upstream.test_modeling_common import ModelTesterMixin, ids_tensor

from scbert import ScBertConfig, ScBertForCellClassification, ScBertForMaskedExpression, ScBertModel
from scbert.modeling_scbert import ScBertPreTrainedModel

# by their names the common tests know which classes take which labels
auto.MODEL_MAPPING_NAMES["scbert"] = ScBertModel.__name__
auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES["scbert"] = ScBertForMaskedExpression.__name__
auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["scbert"] = ScBertForCellClassification.__name__


class ScBertModelTester:
    """A tiny model and a batch for it, in the words of the common tests."""

    def __init__(self, attention_type="favor"):
        self.attention_type, self.freeze_gene_embeddings = attention_type, True
        self.batch_size, self.seq_length, self.num_labels = 3, 13, 3
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4
        self.is_training = True

    def get_config(self):
        return ScBertConfig(
            vocab_size=99,
            attention_type=self.attention_type,
            freeze_gene_embeddings=self.freeze_gene_embeddings,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            head_dim=8,
            num_random_features=20,
            intermediate_size=37,
            max_position_embeddings=self.seq_length,
            classifier_hidden_sizes=[16],
            num_labels=self.num_labels,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], config.vocab_size)
        mask = torch.ones_like(input_ids)
        mask[0, -3:] = 0
        return config, {"input_ids": input_ids, "attention_mask": mask}


class CommonTests(ModelTesterMixin):
    all_model_classes = (ScBertModel, ScBertForMaskedExpression, ScBertForCellClassification)
    attention_type = "favor"

    def setUp(self):
        self.model_tester = ScBertModelTester(self.attention_type)
        self.config_tester = ConfigTester(self, config_class=ScBertConfig, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_init_weights_can_init_buffers(self):
        # the test is for buffers that are computed; a frozen gene table is one that is drawn
        self.model_tester.freeze_gene_embeddings = False
        super().test_init_weights_can_init_buffers()


class FavorTest(CommonTests, unittest.TestCase):
    """The published model."""


class SoftmaxTest(CommonTests, unittest.TestCase):
    """Exact attention, eager or by SDPA."""

    attention_type = "softmax"

    def setUp(self):
        super().setUp()
        # the common tests ask the class; a model knows by its attention_type
        supported = unittest.mock.patch.object(ScBertPreTrainedModel, "_supports_sdpa", True)
        supported.start()
        self.addCleanup(supported.stop)
