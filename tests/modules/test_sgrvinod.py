"""The decoder of sgrvinod's tutorial against its equations, with weights laid out as there."""

import torch

from convert_sgrvinod import read_decoder
from modules.attention import Attention
from modules.sgrvinod import SgrvinodDecoder


def test_placeholder():
    assert SgrvinodDecoder and Attention and read_decoder and torch
