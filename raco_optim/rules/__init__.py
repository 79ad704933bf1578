"""The rules: Gram matrix and weights -> coefficients of the combined gradient."""

from raco_optim.rules.cagrad import CLIPS as CLIPS
from raco_optim.rules.cagrad import CAGradRule as CAGradRule
from raco_optim.rules.cagrad import Clip as Clip
from raco_optim.rules.function import FunctionRule as FunctionRule
from raco_optim.rules.linear import LinearRule as LinearRule
from raco_optim.rules.min_norm import MinNormRule as MinNormRule
from raco_optim.rules.mixing import mixing_coefficients as mixing_coefficients
from raco_optim.rules.rule import MixingCoefficients as MixingCoefficients
from raco_optim.rules.rule import Rule as Rule
