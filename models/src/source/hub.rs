//! Models on a Hugging Face hub, kept in the cache that all its programs share.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::select::{self, Selection};
use super::spec::{HubRepo, is_path};
use super::transfer::{FileInfo, HubError, Transfer};
use super::{ModelFiles, ModelKind, Progress, SourceOptions, disk, local, parallel};
use crate::ModelError;

const DEFAULT_REVISION: &str = "main";

/// A repository at one revision, on the hub and in the cache.
struct HubModel<'a> {
    repo: &'a HubRepo,
    options: &'a SourceOptions,
    /// As asked for: a branch, a tag or a commit.
    named: Repo,
    transfer: Transfer,
}

/// Files of a repository at a commit, with their lengths where the hub says them.
struct Listing {
    commit: String,
    files: Vec<String>,
    bytes: HashMap<String, u64>,
}

/// Finds `repo` on the hub, or in the cache where the hub is out of reach or not to be asked.
pub(super) fn resolve(
    repo: &HubRepo,
    options: &SourceOptions,
    progress: &mut dyn Progress,
) -> Result<ModelFiles, ModelError> {
    let revision = repo.revision.as_deref().unwrap_or(DEFAULT_REVISION);
    let named = Repo::with_revision(repo.id.clone(), RepoType::Model, revision.to_owned());
    let url = api(options, &named)?.url("");
    let model = HubModel { repo, options, named, transfer: Transfer::new(options, &url) };
    if options.hub_offline {
        return model.cached().map_err(|reason| {
            ModelError::Source(format!(
                "{}: {reason}; HF_HUB_OFFLINE is set, so it is not fetched from the hub",
                repo.id
            ))
        });
    }
    match model.fetch(progress) {
        Ok(files) => Ok(files),
        Err(HubError::Local(error)) => Err(error),
        Err(HubError::Refused(reason)) => Err(ModelError::Source(reason)),
        Err(HubError::Unreachable(reason)) => match model.cached() {
            Ok(files) => {
                progress.note(&format!("{reason}; using what the cache holds of {}", repo.id));
                Ok(files)
            }
            Err(cache) => Err(ModelError::Source(format!(
                "cannot fetch {} from the hub: {reason}; and {cache}. Check the network, or set HF_ENDPOINT to a hub this machine can reach",
                repo.id
            ))),
        },
    }
}

/// hf-hub's view of a repository: it knows the URLs.
fn api(options: &SourceOptions, repo: &Repo) -> Result<ApiRepo, ModelError> {
    let mut builder = ApiBuilder::from_cache(Cache::new(options.hub_cache_dir.clone()));
    if let Some(endpoint) = &options.hub_endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    let api = builder.build().map_err(|e| ModelError::Source(format!("the hub's client cannot start: {e}")))?;
    Ok(api.repo(repo.clone()))
}

impl HubModel<'_> {
    fn cache(&self) -> CacheRepo {
        Cache::new(self.options.hub_cache_dir.clone()).repo(self.named.clone())
    }

    /// The model as the cache has it.
    fn cached(&self) -> Result<ModelFiles, String> {
        let revision = self.named.revision();
        let dir = self.options.hub_cache_dir.join(self.named.folder_name());
        let commit = std::fs::read_to_string(dir.join("refs").join(revision));
        let commit = commit.map_or_else(|_| revision.to_owned(), |commit| commit.trim().to_owned());
        let snapshot = self.cache().pointer_path(&commit);
        if !is_path(&commit) || !snapshot.is_dir() {
            return Err(format!("the cache {} does not hold it", self.options.hub_cache_dir.display()));
        }
        local::in_dir(&snapshot, self.repo.id.clone(), self.repo.pick.as_deref()).map_err(|e| e.to_string())
    }

    fn fetch(&self, progress: &mut dyn Progress) -> Result<ModelFiles, HubError> {
        let listing = self.listing()?;
        let refused = |reason: String| HubError::Refused(format!("{}: {reason}", self.repo.id));
        let selection = select::select(&listing.files, self.repo.pick.as_deref()).map_err(refused)?;
        let snapshot = self.cache().pointer_path(&listing.commit);
        let kind = match selection {
            Selection::Gguf { files } => {
                self.fetch_all(&listing, &files, &snapshot, progress)?;
                ModelKind::Gguf { path: snapshot.join(&files[0]) }
            }
            Selection::Safetensors { files } => {
                self.fetch_all(&listing, &files, &snapshot, progress)?;
                let index = snapshot.join(select::INDEX);
                let shards = if index.is_file() {
                    let json = std::fs::read(&index).map_err(|e| refused(e.to_string()))?;
                    select::indexed(&json).map_err(|reason| refused(format!("{} {reason}", select::INDEX)))?
                } else {
                    select::safetensors(&listing.files)
                };
                self.fetch_all(&listing, &shards, &snapshot, progress)?;
                ModelKind::Safetensors {
                    shards: shards.iter().map(|file| snapshot.join(file)).collect(),
                    dir: snapshot,
                }
            }
        };
        // Only now: whoever finds the revision by its name finds it whole.
        self.cache()
            .create_ref(&listing.commit)
            .map_err(|e| HubError::Local(disk::write_error(&self.options.hub_cache_dir, &e)))?;
        Ok(ModelFiles { name: self.repo.id.clone(), kind })
    }

    /// Asks the hub for the revision's commit and files.
    fn listing(&self) -> Result<Listing, HubError> {
        let api = api(self.options, &self.named).map_err(HubError::Local)?;
        // hf-hub builds this URL only inside a request of its own client, so it is cut from the one of a file.
        let file_url = api.url("");
        let tail = format!("/{}/resolve/{}/", self.named.url(), self.named.url_revision());
        let endpoint = file_url.strip_suffix(&tail).unwrap_or(&file_url);
        let url = format!("{endpoint}/api/{}?blobs=true", self.named.api_url());
        let json = self.transfer.json(&url)?;
        let commit = json["sha"].as_str().filter(|sha| is_path(sha) && !sha.contains('/'));
        let (Some(commit), Some(siblings)) = (commit, json["siblings"].as_array()) else {
            return Err(HubError::Unreachable(format!("{url} does not answer like a hub: no commit or no files")));
        };
        let mut listing = Listing { commit: commit.to_owned(), files: Vec::new(), bytes: HashMap::new() };
        for sibling in siblings {
            // A name that could leave the cache is no file of any model.
            let Some(name) = sibling["rfilename"].as_str().filter(|name| is_path(name)) else {
                continue;
            };
            if let Some(bytes) = sibling["size"].as_u64() {
                listing.bytes.insert(name.to_owned(), bytes);
            }
            listing.files.push(name.to_owned());
        }
        Ok(listing)
    }

    /// Brings those of `files` that are not in the snapshot there.
    fn fetch_all(
        &self,
        listing: &Listing,
        files: &[String],
        snapshot: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), HubError> {
        // A link whose blob somebody deleted is missing too.
        let missing: Vec<&String> = files.iter().filter(|file| !snapshot.join(file).is_file()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let at_commit = Repo::with_revision(self.repo.id.clone(), RepoType::Model, listing.commit.clone());
        let api = api(self.options, &at_commit).map_err(HubError::Local)?;
        let urls: Vec<(&String, String)> =
            missing.into_iter().map(|file| (file, api.url(&percent_encoded(file)))).collect();
        let infos = parallel::run(&urls, progress, |(_, url), _| self.transfer.info(url))?;
        let files: Vec<(&String, String, FileInfo)> =
            urls.into_iter().zip(infos).map(|((file, url), info)| (file, url, info)).collect();
        let wanted: Vec<_> = files.iter().filter(|(_, _, info)| !self.is_whole(info)).collect();
        let there = |info: &FileInfo| std::fs::metadata(self.part(info)).map_or(0, |part| part.len());
        let bytes = wanted.iter().map(|(file, _, info)| {
            listing.bytes.get(*file).copied().unwrap_or(info.bytes).saturating_sub(there(info))
        });
        disk::create_dir(&self.options.hub_cache_dir).map_err(HubError::Local)?;
        disk::check_space(&self.options.hub_cache_dir, bytes.sum()).map_err(HubError::Local)?;
        if let [(first, ..), rest @ ..] = wanted.as_slice() {
            let what = match rest.len() {
                0 => (*first).clone(),
                more => format!("{} files of {}", more + 1, self.repo.id),
            };
            progress.start(&what, Some(wanted.iter().map(|(_, _, info)| info.bytes).sum()));
        }
        let fetched = parallel::run(&wanted, progress, |(file, url, info), progress| {
            self.fetch_blob(url, file, info, progress)
        });
        if !wanted.is_empty() {
            progress.finish();
        }
        fetched?;
        for (file, _, info) in &files {
            link(&self.cache().blob_path(&info.etag), &snapshot.join(file)).map_err(HubError::Local)?;
        }
        Ok(())
    }

    /// Whether the file is in the cache, under the name its ETag gives it.
    fn is_whole(&self, info: &FileInfo) -> bool {
        std::fs::metadata(self.cache().blob_path(&info.etag)).is_ok_and(|file| file.len() == info.bytes)
    }

    /// Where the file is kept until it is complete.
    fn part(&self, info: &FileInfo) -> PathBuf {
        let blob = self.cache().blob_path(&info.etag);
        blob.with_file_name(format!("{}.incomplete", info.etag))
    }

    /// Downloads a file, unless it is there.
    fn fetch_blob(
        &self,
        url: &str,
        name: &str,
        info: &FileInfo,
        progress: &mut dyn Progress,
    ) -> Result<(), HubError> {
        let blob = self.cache().blob_path(&info.etag);
        let blobs = blob.parent().expect("a blob has a directory");
        let locks = self.options.hub_cache_dir.join(".locks").join(self.named.folder_name());
        disk::create_dir(blobs).map_err(HubError::Local)?;
        disk::create_dir(&locks).map_err(HubError::Local)?;
        let lock_path = locks.join(format!("{}.lock", info.etag));
        let _lock = disk::lock(&lock_path, name, progress).map_err(HubError::Local)?;
        // While we waited, whoever had the lock may have fetched it.
        if self.is_whole(info) {
            progress.received(info.bytes);
            return Ok(());
        }
        let part = self.part(info);
        let downloaded = self.transfer.download(url, info, &part, progress)?;
        disk::publish(&downloaded, &part, &blob).map_err(|e| HubError::Local(disk::write_error(&blob, &e)))
    }
}

/// Makes `pointer` a relative link to `blob`, so that the cache can be moved.
fn link(blob: &Path, pointer: &Path) -> Result<(), ModelError> {
    let dir = pointer.parent().expect("a file in a snapshot has a directory");
    disk::create_dir(dir)?;
    // …/snapshots/COMMIT/FILE → …/blobs/ETAG
    let root = blob.parent().and_then(Path::parent).expect("a blob lies in REPO/blobs");
    let depth = dir.strip_prefix(root).map_or(0, |below| below.components().count());
    let mut target: PathBuf = std::iter::repeat_n("..", depth).collect();
    target.push("blobs");
    target.push(blob.file_name().expect("a blob has a name"));
    // Another process may be done with the same file already, and reading it.
    disk::link(&target, pointer)
}

/// A path as part of a URL.
fn percent_encoded(path: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    path.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
