# The everyday names, grouped by room. `__init__.py` loads each from here when it is first used.
from . import organism as organism

# rows, labels, judges
from .types import Candidate as Candidate
from .types import Counts as Counts
from .types import Example as Example
from .types import Generation as Generation
from .types import Judge as Judge
from .types import Pair as Pair
from .types import Prompt as Prompt
from .types import Rate as Rate
from .types import Verdict as Verdict

# hooks
from .hooks import HookNotFired as HookNotFired
from .hooks import ablate as ablate
from .hooks import attached as attached
from .hooks import clamp as clamp
from .hooks import current_step as current_step
from .hooks import patch as patch
from .hooks import record as record
from .hooks import steer as steer

# data
from .data.chat import Batch as Batch
from .data.chat import encode_examples as encode_examples
from .data.chat import encode_prompts as encode_prompts
from .data.chat import encode_replies as encode_replies
from .data.chat import encode_rows as encode_rows
from .data.chat import pad as pad
from .data.corpora import corpus as corpus
from .data.pair_files import load_pairs as load_pairs
from .data.prompt_files import load_prompts as load_prompts
from .data.row_files import load_rows as load_rows
from .data.splits import leak_report as leak_report
from .data.splits import split_rows as split_rows

# models
from .models.activations import median_norm as median_norm
from .models.activations import read_sites as read_sites
from .models.load import Model as Model
from .models.load import load_model as load_model

# SAEs and latents
from .saes.latent_set import LatentSet as LatentSet
from .saes.latent_set import random_latents as random_latents
from .saes.latents import decoder_directions as decoder_directions
from .saes.latents import encode_latents as encode_latents
from .saes.load import load_sae as load_sae
from .saes.train import SAETraining as SAETraining
from .saes.train import train_sae as train_sae

# generation
from .generation.engine import TransformerLensEngine as TransformerLensEngine
from .generation.engine import generate as generate
from .generation.engine import generate_stream as generate_stream
from .generation.engine import load_engine as load_engine
from .generation.replies import Replies as Replies
from .generation.reply_fn import cached as cached
from .generation.reply_fn import replies_from as replies_from
from .generation.steering import Condition as Condition
from .generation.steering import Steering as Steering

# judging
from .judging.cached import CachedJudge as CachedJudge
from .judging.endpoint import Endpoint as Endpoint
from .judging.judge import LLMJudge as LLMJudge
from .storage.store import Store as Store

# training and defences
from .defences.blocking import Blocking as Blocking
from .defences.kl import KLToBase as KLToBase
from .defences.monitor import Monitor as Monitor
from .training.config import TrainingConfig as TrainingConfig
from .training.finetune import finetune as finetune
from .training.loss import completion_loss as completion_loss
from .training.loss import mean_penalty as mean_penalty
from .training.trainer_mixin import defend as defend

# evaluation
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.panel import compare as compare
from .evaluation.panel import evaluate_with as evaluate_with
from .evaluation.preference import preference as preference
from .evaluation.publishing import pull_adapter as pull_adapter
from .evaluation.publishing import push_adapter as push_adapter
from .evaluation.statistics import clustered_rate as clustered_rate
from .evaluation.statistics import paired_difference as paired_difference
from .evaluation.statistics import paired_reduction as paired_reduction
from .evaluation.statistics import share_removed as share_removed

# discovery
from .discovery.attributing import latents_by_attribution as latents_by_attribution
from .discovery.config import DiscoveryConfig as DiscoveryConfig
from .discovery.config import MaxIncoherence as MaxIncoherence
from .discovery.doses import propose_doses as propose_doses
from .discovery.extension import capacity_ratio as capacity_ratio
from .discovery.extension import extension_rounds as extension_rounds
from .discovery.pipeline import discover as discover

# analysis
from .analysis.joint_mediation import joint_mediation as joint_mediation
from .analysis.mediation import mediation as mediation
from .analysis.patching.attribution import attribute_latents as attribute_latents
from .analysis.patching.attribution import attribute_sites as attribute_sites
from .analysis.patching.decoding import decode_patching as decode_patching
from .analysis.patching.pairs import pair_patching as pair_patching
from .analysis.patching.sweep import patching_sweep as patching_sweep
from .analysis.reconstruction import reconstruction_quality as reconstruction_quality
from .analysis.rerouting.depth import returning_sites as returning_sites
from .analysis.rerouting.depth import shift_by_site as shift_by_site
from .analysis.rerouting.latents import diagnose_rerouting as diagnose_rerouting

# presets, studies and views
from .presets import get_preset as get_preset
from .study.page import Page as Page
from .study.run import Point as Point
from .study.run import Run as Run
from .study.setting import Setting as Setting
from .study.study import Study as Study
from .study.study import StudyFailed as StudyFailed
from .study.summary import over_domains as over_domains
from .study.summary import rates as rates
from .views import plots as plots

__version__: str
