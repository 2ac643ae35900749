"""Names that options have in other programs, and the nearest option for an unknown one."""

from collections.abc import Collection

from .errors import nearest

# Names that options have in timm, torchvision's references, Hugging Face's Trainer and codes of papers. By the name
# here, or by the first of several that the command has.
NAMES_ELSEWHERE = {
    (
        "student",
        "model",
    ): "arch model_name_or_path net network backbone student_model student_arch model_s student_name",
    ("student",): "model",
    ("teacher",): "teacher_model teacher_arch teacher_name model_t teacher_model_name_or_path",
    ("teacher_weights",): "teacher_path teacher_ckpt teacher_checkpoint teacher_pretrained path_t",
    ("student_weights", "weights"): "student_path student_ckpt pretrained initial_checkpoint checkpoint ckpt",
    ("format",): "formats to export_format",
    ("top",): "topk top_k k",
    ("method",): "distill distiller distill_method kd_method",
    ("data",): "data_path dataset dataset_name root train_dir imagenet",
    ("batch_size",): "bs per_device_train_batch_size train_batch_size bsz",
    ("workers",): "j num_workers n_workers dataloader_num_workers",
    ("image_size",): "img_size input_size size resolution crop_size train_crop_size crop",
    ("epochs",): "num_epochs num_train_epochs max_epochs n_epochs",
    ("lr",): "learning_rate base_lr init_lr blr",
    ("opt",): "optim optimizer",
    ("weight_decay",): "wd l2",
    ("sched",): "scheduler lr_scheduler lr_scheduler_type lr_sched lr_policy lr_decay",
    ("decay_milestones",): "milestones lr_milestones lr_steps lr_decay_epochs multi_steps",
    ("decay_rate",): "lr_gamma lr_decay_rate step_gamma",
    ("decay_epochs",): "lr_step_size step_size",
    ("warmup_epochs",): "warmup lr_warmup_epochs num_warmup_epochs warmup_steps",
    ("clip_grad",): "grad_clip max_grad_norm clip_grad_norm gradient_clip_val",
    ("grad_accum",): "gradient_accumulation_steps accumulation_steps grad_accum_steps accumulate_grad_batches",
    ("smoothing",): "label_smoothing label_smoothing_factor",
    ("mixup",): "mixup_alpha",
    ("cutmix",): "cutmix_alpha",
    ("ema_decay",): "ema model_ema model_ema_decay",
    ("amp_dtype",): "amp fp16 bf16 half precision mixed_precision",
    ("compile",): "torchcompile torch_compile",
    ("device",): "gpu gpus gpu_id cuda",
    ("seed",): "random_seed manual_seed",
    ("out",): "output output_dir output_path save_dir save_path save log_dir logdir work_dir exp_dir experiment",
    ("resume",): "resume_from_checkpoint auto_resume continue",
    ("temperature",): "temp tau kd_t kd_temperature distillation_temperature t",
    ("kd_weight",): "kd_alpha distill_weight distillation_weight",
    ("log",): "tensorboard tb log_tb wandb log_wandb mlflow report_to logger loggers",
    ("log_interval",): "print_freq log_every log_steps logging_steps log_every_n_steps",
    ("quiet",): "silent q",
    ("val_fraction",): "val_split val_frac val_ratio train_val_split validation_split",
    ("split_seed",): "val_seed",
}
ELSEWHERE = {name: ours for ours, names in NAMES_ELSEWHERE.items() for name in names.split()}


def nearest_option(name: str, known: Collection[str], dashes: bool = False) -> str:
    """`" (did you mean 'x'?)"` for an unknown option, by its meaning elsewhere or its letters, or an empty string.

    `name` and `known` have underscores. With `dashes` the hint is as the command line has it: '--batch-size'.
    """
    shown = {choice: "--" + choice.replace("_", "-") if dashes else choice for choice in known}
    meant = [choice for choice in ELSEWHERE.get(name.lower(), ()) if choice in known]
    return f" (did you mean {shown[meant[0]]!r}?)" if meant else nearest(name, shown.values())
