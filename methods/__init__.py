"""The methods by name. A new one is a file with a subclass of `engine.method.Method`, and its entry here."""

from engine.method import Method
from methods.a_gem import AGEM
from methods.adam_nscl import AdamNSCL
from methods.code_cl import CODECL
from methods.cuber import CUBER
from methods.dfgp import DFGP
from methods.dual_gpm import DualGPM
from methods.er import ER
from methods.ewc import EWC
from methods.fs_dgpm import FSDGPM
from methods.gpm import GPM
from methods.hat import HAT
from methods.multitask import Multitask
from methods.naive import Naive
from methods.ogd import OGD
from methods.owm import OWM
from methods.sgp import SGP
from methods.single import Single
from methods.trgp import TRGP

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(GPM, Naive, Multitask, Single, EWC, AGEM, ER, OWM, OGD, HAT),
        *(DualGPM, SGP, DFGP, TRGP, CODECL, CUBER, FSDGPM, AdamNSCL),
    )
}
