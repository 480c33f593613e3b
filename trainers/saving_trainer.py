"""A `Trainer` whose checkpoints survive (see `checkpoint`), and hold the policy's own adapter with its lineage, not the
whole stack.
"""

from pathlib import Path

from transformers import Trainer

from ..lineage import Lineage
from ..models import POLICY, load_policy, save_policy
from . import checkpoint


class SavingTrainer(Trainer):
    """To be inherited before another trainer, which sets `_lineage`: that of a LoRA policy."""

    _lineage: Lineage
    _saving_in: Path | None = None

    def save_final(self) -> Path:
        """The newest checkpoint's folder, saved now unless this step has one already."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not (folder / "trainer_state.json").is_file():
            self._save_checkpoint(self.model, trial=None)
        return folder

    def _save_checkpoint(self, model, trial) -> None:
        if not self.args.should_save:
            super()._save_checkpoint(model, trial)
            return
        with checkpoint.aside(Path(self.args.output_dir), f"checkpoint-{self.state.global_step}") as scratch:
            self._saving_in = scratch
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_in = None

    def _get_output_dir(self, trial) -> str:
        return str(self._saving_in) if self._saving_in else super()._get_output_dir(trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            checkpoint.save_training_state(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is not None:
            checkpoint.load_training_state(Path(folder), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:
            checkpoint.save_random_state(Path(output_dir))

    def _load_rng_state(self, folder: str | None) -> None:
        if folder is not None:
            checkpoint.load_random_state(Path(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        policy = self.accelerator.unwrap_model(model or self.model)
        if POLICY in getattr(policy, "peft_config", {}):
            load_policy(policy, Path(resume_from_checkpoint) / POLICY, self._lineage)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if POLICY not in getattr(model, "peft_config", {}):
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_policy(model, folder, self._lineage)
        self.processing_class.save_pretrained(folder)
