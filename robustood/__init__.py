"""Robust out-of-distribution detection: perturbation sets, attacks, scores, objectives and reports.

Choose a perturbation set; maximise an objective over it; train against the maximiser; measure what is
left, and certify what can be. The modules are imported by name: ``from robustood import attacks``.
"""

__version__ = "0.1.0"
