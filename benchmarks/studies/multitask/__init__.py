r"""Multi-task learning on real data, without language models: who ends where, at the same effort.

    data.py -> methods.py, training.py -> study.py -> summary.py
    3 sets     a method, one run          the grid    measures, table

``python -m benchmarks.studies.multitask`` does all of it and goes on where it was stopped. The
definitions below were written before the first run; the limit of the steps was raised once, after a
look at the first tuning on the digits, whose records were thrown away.

**Sets.** Every task has its own linear head on one shared trunk (a small MLP). The test set is the
same for all seeds and is touched once, at the end of a run; train and validation set are drawn
anew by each seed from what is left. No source (digit image, person, paper) is in two splits.

**Run.** A method at weights w and a seed: Adam, validation every few steps, early stopping on the
weighted validation loss; the parameters with the lowest one are tested. Runs of one seed share
data, initial parameters and the order of the batches.

**Weights.** The weighted sum, CAGrad and CAGrad-Clip take them as theirs; UPGrad and Aligned-MTL as
the preference vector that TorchJD gives them. The others take none: their losses are multiplied by
m w_i, as users do, or not, whichever is better on validation (FairGrad: always multiplied). The
update of the trunk of IMTL-G and Nash-MTL does not change with the scale of a loss, so for them
weights matter for early stopping only. Heads get w_i g_i in every method.

**Effort.** Eight trials a method and set, on a seed of their own, at two weights (equal, and more
for the last task): eight learning rates, or four times the two values of the method's own
parameter, over the same range. Chosen once for all weights: the lowest sum over the two weights of
the weighted validation loss.

**Measures.** L_i is a test loss, s_i the score of the task (accuracy, R^2, area under the ROC
curve). The relative loss is L_i over that of the best constant prediction, the relative error
1 - s_i over that of a constant prediction: 0 is perfect, 1 has learnt nothing.

- mean rank: of the relative error among the methods, 1 the best, for every task, weights and seed;
- hypervolume: of a method's points at all weights, reference 1 in every task, for relative losses
  and for relative errors; mean over seeds;
- distance: of a method's point (mean over seeds) to the front of all methods' points, counting
  what it is worse in only (d+ of Ishibuchi et al., 2015); mean over weights; both spaces;
- gap: how far a method is from the trade-off that was asked for, L_w / min over methods L_w - 1
  with L_w = sum_i w_i L_i, mean over seeds before the quotient and over weights after it;
- least weight: relative loss of the task with the smallest weight (mean of several), at unequal
  weights.

Intervals are of 95 %, from a bootstrap over seeds that all methods share, so that differences are
paired. Five seeds are few: such intervals are too narrow, and they say nothing of other test sets.
"""

import os

# Threads that wait for work sleep instead of spinning on cores that other processes need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
